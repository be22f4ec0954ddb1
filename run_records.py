"""What a run shows and what it leaves: the progress bar, sample tables, metrics.jsonl, config.json and curve.png.

Owns the forms of those; the figures in them come from the trainer. Written on the main process only.
"""

import dataclasses
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.trainer_callback import ProgressCallback

from environment import Outcome
from options import Options, ResolvedDefault
from preflight import CONFIG_NAME
from rollouts import RolloutRecord

METRICS_NAME = "metrics.jsonl"
CURVE_NAME = "curve.png"
RECORDED_PACKAGES = (
    "torch", "torchvision", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets", "pillow",
    "flash-attn", "bitsandbytes", "vllm",
)  # fmt: skip
OUTCOME_STYLES = {Outcome.CORRECT: "green", Outcome.WRONG_INDEX: "yellow"}


class RunRecorder(ProgressCallback):
    """The progress bar with reward and accuracy in it, tables of completions, and metrics.jsonl."""

    def __init__(self, trainer: Any, output_dir: Path, sample_steps: int):
        """trainer: a FleetRLOOTrainer. sample_steps: optimizer steps between tables, 0 for none."""
        super().__init__()
        self.trainer = trainer
        self.output_dir = output_dir
        self.metrics_path = output_dir / METRICS_NAME
        self.sample_steps = sample_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops lines past the step that the run resumes from: those steps are taken and written again."""
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero and self.metrics_path.exists():
            kept = [line for line in read_metrics(self.metrics_path) if line["step"] <= state.global_step]
            unfinished = self.metrics_path.with_suffix(".unfinished")
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(unfinished, self.metrics_path)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Writes one JSON object, the step and every figure, and shows the latest two at the end of the bar."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        if "reward" in logs:  # a step that reuses a generation has none of its own
            self.training_bar.set_postfix(reward=f"{logs['reward']:.2f}", accuracy=f"{logs['accuracy']:.2f}")
        figures = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **finite}) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the run's configuration into the checkpoint, whose own config.json is the model's."""
        if state.is_world_process_zero:
            checkpoint = self.output_dir / f"checkpoint-{state.global_step}"
            shutil.copyfile(self.output_dir / CONFIG_NAME, checkpoint / "run_config.json")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar, and prints the table when it is due."""
        super().on_step_end(args, state, control, **kwargs)
        is_due = self.sample_steps and (state.global_step == 1 or state.global_step % self.sample_steps == 0)
        if state.is_world_process_zero and is_due:
            self.training_bar.write(sample_table(self.trainer.latest_rollouts, state.global_step), file=sys.stderr)


def sample_table(rollouts: Sequence[RolloutRecord], step: int, max_rows: int = 4) -> str:
    """A few different completions as a table for the terminal: one of each outcome first."""
    distinct = {(rollout.correct_index, rollout.target, rollout.completion): rollout for rollout in reversed(rollouts)}
    first_of_outcome = {rollout.judgement.outcome: rollout for rollout in distinct.values()}
    others = [rollout for rollout in distinct.values() if rollout not in first_of_outcome.values()]
    chosen = [*first_of_outcome.values(), *others]
    table = Table(title=f"step {step}: sample completions", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("wanted", "completion", "outcome"):
        table.add_column(name, overflow="fold")
    for name in ("reward", "advantage"):
        table.add_column(name, justify="right")
    for rollout in chosen[:max_rows]:
        outcome, status = rollout.judgement.outcome, rollout.judgement.parse_status
        wanted = str(rollout.correct_index) + (f" ({rollout.target})" if rollout.target else "")
        verdict = outcome.value if outcome is not Outcome.UNPARSABLE else f"{outcome.value}: {status.value}"
        table.add_row(
            wanted,
            Text(_one_line(rollout.completion)),
            Text(verdict, style=OUTCOME_STYLES.get(outcome, "red")),
            f"{rollout.reward:.2f}",
            f"{rollout.advantage:+.2f}",
        )
    return _rendered(table)


def resolved_table(filled: Sequence[ResolvedDefault]) -> str:
    """What was decided for the user, and why, as a table for the terminal."""
    table = Table(title="defaults for this case", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("flag", "value", "why"):
        table.add_column(name)
    for default in filled:
        table.add_row(f"--{default.flag}", str(default.value), default.reason)
    return _rendered(table)


def write_config(output_dir: Path, options: Options) -> None:
    """Writes config.json: the resolved flags, the command, the git commit and the versions that ran."""
    config = {
        "options": dataclasses.asdict(options),
        "command": sys.argv,
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }
    (output_dir / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that can change a result, as far as they are installed."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" if files were changed since; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. A last line torn by a kill is left out; any other broken line raises ValueError."""
    lines = path.read_text(encoding="utf-8").splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line") from error
    return metrics


def draw_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws reward and accuracy over steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=150)
    metrics = [line for line in metrics if "reward" in line]
    steps = [line["step"] for line in metrics]
    for name, colour in (("reward", "#d1495b"), ("accuracy", "#00798c")):
        axes.plot(steps, [line.get(name) for line in metrics], color=colour, linewidth=1.8, label=f"mean {name}")
    axes.set(xlabel="optimizer step", title=title, ylim=(-0.02, 1.04))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _one_line(text: str, max_chars: int = 160) -> str:
    flat = text.encode("unicode_escape").decode("ascii")
    return flat if len(flat) <= max_chars else flat[: max_chars - 1] + "…"


def _rendered(table: Table) -> str:
    is_terminal = sys.stderr.isatty()
    target = io.StringIO()
    Console(file=target, width=None if is_terminal else 110, force_terminal=is_terminal).print(table)
    return target.getvalue()
