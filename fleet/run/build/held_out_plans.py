"""The held-out episodes of a training run: those of evaluation, and those of the look curve."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

from fleet.command.flags import HeldOutFlags
from fleet.command.image_check import RunData
from fleet.command.training_flags import EvaluationFlags
from fleet.controls import Control
from fleet.episodes import BrokenEpisode
from fleet.errors import UsageError, refused
from fleet.evaluation.figures import EvaluationPlan, offered_controls
from fleet.evaluation.held_out import RunEpisodes, make_plan
from fleet.evaluation.looking import LOOK_CONTROLS
from utils.images import BadImage

logger = logging.getLogger("fleet")


def plan_held_out(
    task: HeldOutFlags,
    flags: EvaluationFlags,
    by_default: Collection[str],
    runs: Sequence[RunEpisodes],
    data: RunData,
) -> tuple[EvaluationPlan | None, EvaluationPlan | None]:
    """The plans of evaluation and of the look curve, each None where the flags ask for none.

    The look curve has the first of evaluation's episodes, if these are enough. task, flags: of one run. by_default: the
    flags that were filled in. Raises UsageError if an environment without grey pictures was asked for the curve, or as
    make_plan does.
    """

    def plan_of(flag: str) -> EvaluationPlan:
        return make_plan(
            task,
            runs,
            skipped_images=data.skipped_images,
            drawn_images=data.sha256s,
            num_episodes_flag=flag,
        )

    evaluation = plan_of("eval_episodes") if flags.eval_steps else None
    if not flags.control_steps:
        return evaluation, None
    assert flags.control_episodes is not None, "the options are resolved"
    is_enough = evaluation is not None and flags.control_episodes <= len(evaluation.episodes)
    drawn = evaluation if evaluation is not None and is_enough else plan_of("control_episodes")
    look = replace(drawn, episodes=drawn.episodes[: flags.control_episodes], controls=LOOK_CONTROLS)
    with refused(BrokenEpisode, before=f"env={task.env}: "):
        if has_grey_pictures(look):
            return evaluation, look
    if "control_steps" not in by_default or flags.stop_if_blind == "stop":
        asked = "stop_if_blind=stop" if "control_steps" in by_default else f"control_steps={flags.control_steps}"
        raise UsageError(
            f"{asked}, but edited() of --env gives no episode for the control {Control.BLANK_IMAGES}; give one, as "
            "environment.Environment does, or pass --control_steps 0 --stop_if_blind none"
        )
    logger.info("no look curve is taken: edited() of --env gives no episode with grey pictures\n")
    return evaluation, None


def has_grey_pictures(plan: EvaluationPlan) -> bool:
    """True if the environment has the control of grey pictures, or its first picture does not open and nothing tells.

    Raises BrokenEpisode.
    """
    try:
        return Control.BLANK_IMAGES in offered_controls(plan)
    except (BadImage, OSError):
        return True
