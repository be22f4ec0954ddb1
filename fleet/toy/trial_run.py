"""A short run of RLOO on an environment of one's own: a throw-away toy must come to earn more within 20 steps.

The toy was taught the form of the environment's calls from answers to other episodes, and to give no call at all in
two of three answers. To stop saying what earns nothing is learnt in a few steps, whatever the task: a reward that does
not move shows that something between prompt and loss is broken, or that calls earn nothing.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, linear_regression

from fleet.command.flags import TaskFlags
from fleet.command.parser import as_arguments
from fleet.command.preflight import make_environment
from fleet.errors import UsageError
from fleet.run_folder import METRICS_NAME, finite, read_jsonl
from fleet.toy.process import build_in_own_process

NUM_STEPS, WINDOW = 20, 5
SETTINGS = {
    "train_steps": NUM_STEPS,
    "per_device_batch_size": 32,  # with 16 the noise of a step hid the rise in one run of four
    "num_rollouts": 8,
    "learning_rate": 6e-4,
    "report_to": "none",
    "sample_steps": 0,
    "save_steps": NUM_STEPS,
}
TRAINING = Path(__file__).resolve().parents[2] / "training.py"


@dataclass(frozen=True)
class Trend:
    """The mean rewards of the first and the last steps, and the slope over all of them in its standard errors."""

    before: float
    after: float
    num_errors: float

    @property
    def is_rising(self) -> bool:
        """True if the slope is up, and beyond chance."""
        return self.num_errors > 3


def trend_of(rewards: Sequence[float], window: int = WINDOW) -> Trend:
    """The trend of rewards, one a step. Raises ValueError unless there are twice as many as `window`.

    >>> trend_of([0.0, 0.1, 0.0, 0.1, 0.4, 0.5, 0.4, 0.5], window=4).is_rising
    True
    """
    count = len(rewards)
    if count < 2 * window:
        raise ValueError(f"{count} rewards, but two windows of {window} are compared; log more steps")
    slope, intercept = linear_regression(range(count), rewards)
    squares = sum((reward - intercept - slope * step) ** 2 for step, reward in enumerate(rewards))
    error = math.sqrt(squares / (count - 2) / ((count**3 - count) / 12))
    num_errors = slope / error if error else math.copysign(math.inf, slope) if slope else 0.0
    return Trend(fmean(rewards[:window]), fmean(rewards[-window:]), num_errors)


def train_briefly(task: TaskFlags, seed: int) -> Trend:
    """The trend of the reward over a run of NUM_STEPS steps. Takes a minute or two, and leaves nothing but the toy.

    task: with an `env`. Raises UsageError if the toy or the run fails, with the run's last words.
    """
    # behind torch
    from fleet.toy.model import RELUCTANT, SCHOOL_SEED

    toy = build_in_own_process(RELUCTANT, make_environment(task, SCHOOL_SEED), task)
    flags = {field.name: getattr(task, field.name) for field in fields(TaskFlags)}
    with tempfile.TemporaryDirectory() as folder:
        run = SETTINGS | {"model_id": toy, "seed": seed, "output_dir": f"{folder}/run"}
        command = [sys.executable, str(TRAINING), *as_arguments(flags | run)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode:
            words = [line for line in done.stdout.splitlines() if line.strip()]
            raise UsageError(
                f"env={task.env}: a run of {NUM_STEPS} steps failed: {words[-1] if words else 'no output'}"
            )
        lines = read_jsonl(Path(folder) / "run" / METRICS_NAME)
    rewards = [reward for line in lines if (reward := finite(line.get("reward"))) is not None]
    return trend_of(rewards)
