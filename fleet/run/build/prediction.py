"""A checked run is predicted: what it needs, whether that fits, and whether activations must be computed again.

Owns how a plan (fleet/planning) meets a run: what is said at its start and by --dry_run, and what is recorded.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from fleet.run import model_setup
from fleet.run.records import rendered
from utils.plain_text import printable

logger = logging.getLogger("fleet")


@dataclass(frozen=True)
class RunPrediction:
    """What a run is predicted to need on this process; of which nothing is known if the model's configuration is not.

    plain, checkpointed: without and with gradient checkpointing; the latter only where it is asked for or needed.
    """

    plain: Prediction | None
    checkpointed: Prediction | None
    unknown: str | None = None

    @property
    def fits_without_checkpointing(self) -> bool:
        """True if no activation need be computed again. False where nothing is known."""
        return self.plain is not None and self.plain.fits

    def settled(self, *, is_checkpointed: bool) -> "RunPrediction":
        """The prediction for the run as it will be: of both ways, the other is dropped."""
        plain, checkpointed = (None, self.checkpointed) if is_checkpointed else (self.plain, None)
        return RunPrediction(plain, checkpointed, self.unknown)

    @property
    def found(self) -> Prediction | None:
        """The prediction, once it is settled."""
        return self.checkpointed or self.plain

    def figures(self) -> dict[str, Any] | None:
        """The prediction for config.json."""
        return None if self.found is None else figures_of(self.found)


NOTHING_PREDICTED = RunPrediction(None, None, "nothing was asked")


def predict(options: Options, args: RLOOConfig, env: EpisodeSource) -> RunPrediction:
    """The prediction for a run with these resolved options, on this process. Loads no weight."""
    launch, machine = place_of(options, args)
    config, processor = known_model(options, options)
    if config is None:
        return RunPrediction(None, None, f"the configuration of {printable(options.model_id)} is not on this machine")
    try:
        planner = Planner(options, env, launch, machine, config, processor)
        plain = None if options.gradient_checkpointing is True else planner.prediction(is_checkpointed=False)
        needs_both = options.gradient_checkpointing == "auto" and plain is not None and not plain.fits
        checkpointed = None
        if options.gradient_checkpointing is True or needs_both:
            checkpointed = planner.prediction(is_checkpointed=True)
    # a pass without data leans on much of torch, and a run that would work must not end for its prediction
    except Exception as error:
        return RunPrediction(None, None, f"the run could not be counted ({type(error).__name__}: {one_line(error)})")
    return RunPrediction(plain, checkpointed)


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
    """Prints what the run needs, as a table or one JSON object. Raises UsageError if it has problems."""
    found = prediction.found
    problems: Sequence[str] = [f"{prediction.unknown}, so nothing is predicted; download it, or go online"]
    if found is not None:
        problems = problems_of(found)
    if as_json:
        print_answer(problems, {} if found is None else figures_of(found))
    elif found is not None:
        logger.info(rendered(table_of(found), 110), extra=COLOURED)
    if problems:
        listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        logger.info(f"problems:{listed}\n")
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DryRunProblems(f"dry run: this run has {count}, the first: {problems[0]}")
    logger.info("dry run: OK, everything checked is sound and fits; no weight was loaded")
