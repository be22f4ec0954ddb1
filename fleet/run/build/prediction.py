"""A checked run is predicted: what it needs, whether that fits, and whether activations must be computed again.

Owns how a plan (fleet/planning) meets a run: what is said at its start and by --dry_run, and what is recorded.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers.integrations import unset_hf_deepspeed_config
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from trl import RLOOConfig

from environment import EpisodeSource
from fleet.command.command_line import COLOURED
from fleet.command.dry_run import DryRunProblems, print_answer
from fleet.command.options import Options
from fleet.command.training_flags import RunFlags
from fleet.errors import one_line
from fleet.planning.machine import (
    Launch,
    Machine,
    assumed_machine,
    launch_of,
    launch_of_file,
    launch_without_file,
    machine_here,
)
from fleet.planning.plan import Planner, Prediction, known_model
from fleet.planning.problems import problems_of
from fleet.planning.shown import figures_of, line_of, table_of
from fleet.processes import gather_by_rank
from fleet.run import model_setup
from fleet.run.records import rendered
from utils.plain_text import printable

logger = logging.getLogger("fleet")


@dataclass(frozen=True)
class RunPrediction:
    """What a run is predicted to need on this process; None, with the reason, where that is not known."""

    found: Prediction | None
    unknown: str | None = None

    @property
    def fits(self) -> bool:
        """True if it is known to fit."""
        return self.found is not None and self.found.fits

    def figures(self) -> dict[str, Any] | None:
        """The prediction for config.json."""
        return None if self.found is None else figures_of(self.found)


NOTHING_PREDICTED = RunPrediction(None, "nothing was asked")


def predict_together(options: Options, args: RLOOConfig, env: EpisodeSource) -> tuple[bool, RunPrediction]:
    """(whether activations are computed again, the prediction for that). Every process takes part; no weight loads.

    options: resolved. With "auto", activations are kept if that fits on every process.
    """
    asked = options.gradient_checkpointing
    prediction = _predict(options, args, env, is_checkpointed=asked is True)
    if asked != "auto" or all(gather_by_rank(prediction.fits)):
        return asked is True, prediction
    return True, _predict(options, args, env, is_checkpointed=True)


def _predict(options: Options, args: RLOOConfig, env: EpisodeSource, *, is_checkpointed: bool) -> RunPrediction:
    try:
        with _models_unsharded(args):
            launch, machine = place_of(options, args)
            config, processor = known_model(options, options)
            if config is None:
                return RunPrediction(None, f"the configuration of {printable(options.model_id)} is not on this machine")
            planner = Planner(options, env, launch, machine, config, processor)
            return RunPrediction(planner.prediction(is_checkpointed))
    # a pass without data leans on much of torch, and a run that would work must not end for its prediction
    except Exception as error:
        return RunPrediction(None, f"the run could not be counted ({type(error).__name__}: {one_line(error)})")


@contextlib.contextmanager
def _models_unsharded(args: RLOOConfig) -> Iterator[None]:
    """Within it, a model that is made is not sharded, which would take all processes: one counts for its machine."""
    plugin = args.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            # as accelerate does it, whose object it is
            set_hf_deepspeed_config(plugin.dschf)


def place_of(run: RunFlags, args: RLOOConfig) -> tuple[Launch, Machine]:
    """The launch and the machine: those that flags assume, else those that are there."""
    if run.assume_gpus is None:
        launch = launch_of(args)
        return launch, machine_here(launch.processes_per_machine, has_gpu=model_setup.has_gpu())
    count, machine = assumed_machine(run.assume_gpus)
    if run.assume_accelerate is None:
        return launch_without_file(count), machine
    return launch_of_file(run.assume_accelerate, count), machine


def say(prediction: RunPrediction) -> None:
    """Says the prediction in a line at the start of a run, and its problems as warnings."""
    found = prediction.found
    if found is None:
        logger.info(f"no prediction of memory: {prediction.unknown}\n")
        return
    logger.info(line_of(found))
    for problem in problems_of(found):
        logger.warning(f"predicted problem: {problem}\n")


def answer_dry_run(prediction: RunPrediction, *, as_json: bool) -> None:
    """Shows what the run needs, as a table or one JSON object. Raises UsageError if any process has problems.

    Every process takes part; the first one shows its own figures.
    """
    found = prediction.found
    own = [f"{prediction.unknown}, so nothing is predicted"] if found is None else problems_of(found)
    problems = list(dict.fromkeys(problem for of_rank in gather_by_rank(own) for problem in of_rank))
    if as_json and os.environ.get("RANK", "0") == "0":
        print_answer(problems, prediction.figures() or {})
    elif not as_json and found is not None:
        logger.info(rendered(table_of(found), 110), extra=COLOURED)
    if problems:
        listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        logger.info(f"problems:{listed}\n")
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DryRunProblems(f"dry run: this run has {count}, the first: {problems[0]}")
    logger.info("dry run: OK, everything checked is sound and fits; no weight was loaded")
