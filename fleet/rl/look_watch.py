"""LookWatch: takes the points of the look curve while a policy trains, and warns or stops when it gains blindly.

Owns when a point is taken and what follows from the rule in evaluation/looking.py. An evaluation of the same episodes
gives its point without further answers. Every process comes to the same points, so all stop together.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerCallback

from fleet.evaluation.answering import AnswerSettings
from fleet.evaluation.figures import EvaluationPlan, level_without_looking
from fleet.evaluation.looking import NUM_IN_A_ROW, LookPoint, gains_blindly

logger = logging.getLogger("fleet")


@dataclass(frozen=True)
class LookPlan:
    """The fixed episodes of the curve, how they are answered, and what a blind gain does.

    every: optimizer steps between points. num_points: of the whole run at most, those of evaluations included.
    is_of_evaluation: each evaluation answers these episodes too. if_blind: none, warn or stop.
    """

    plan: EvaluationPlan
    settings: AnswerSettings
    every: int
    num_points: int
    is_of_evaluation: bool = False
    if_blind: str = "warn"


class LookWatch(TrainerCallback, ExportableState):
    """Logs a LookPoint before the first step, every so many steps, after the last, and at evaluations of its episodes.

    A checkpoint keeps the start and the count of blind points in a row, so that a resumed run goes on. `stop_reason` is
    set when the run is to end; the end comes with a checkpoint, between two generations.
    """

    def __init__(self, trainer: Any, look: LookPlan):
        """trainer: a FleetRLOOTrainer. Add it behind the callback that records what is logged."""
        self.trainer, self.look = trainer, look
        self.level = level_without_looking(look.plan)
        self.start: LookPoint | None = None
        self.latest_step = -1
        self.num_blind_in_a_row = 0
        self.has_warned = False
        self.stop_reason: str | None = None

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        kept = {
            "start": None if self.start is None else self.start.as_json(),
            "latest_step": self.latest_step,
            "num_blind_in_a_row": self.num_blind_in_a_row,
            "has_warned": self.has_warned,
        }
        return {"args": {}, "attributes": kept}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on from the checkpoint."""
        # a run that had no curve before left no state, and Trainer saves none under a name that is not there
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.start = None if kept["start"] is None else LookPoint.from_json(kept["start"])
        if self.start is not None and len(self.start.is_right) != len(self.look.plan.episodes):
            # resumed with a curve of other episodes, which begins anew
            self.start = None
        self.latest_step, self.num_blind_in_a_row = kept["latest_step"], kept["num_blind_in_a_row"]
        self.has_warned, self.stop_reason = kept["has_warned"], None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the start, unless an evaluation has; a run that is resumed without one starts at its next point."""
        if self.start is None and state.global_step == 0:
            self._take(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the point that is due, unless an evaluation of the episodes is to come; ends the run that is to end."""
        is_due = state.global_step % self.look.every == 0 or state.global_step == state.max_steps
        if is_due and not (control.should_evaluate and self.look.is_of_evaluation):
            # the log of a point counts as the step's own, which is yet to come
            is_log_due = control.should_log
            self._take(state)
            control.should_log = is_log_due
        if self.stop_reason is not None and self.trainer.is_at_generation_end():
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the point from the answers of an evaluation."""
        if self.look.is_of_evaluation:
            self._add(state, LookPoint.of(self.trainer.latest_answers, self.look.plan.episodes, state.global_step))
            if self.stop_reason is not None and self.trainer.is_at_generation_end():
                control.should_save = control.should_training_stop = True

    def _take(self, state: Any) -> None:
        """Answers the episodes for a point. Every rank takes part."""
        start_s = time.perf_counter()
        with self.trainer.apart_from_training():
            answers = self.trainer.answer(self.look.plan, self.look.settings)
        point = LookPoint.of(answers, self.look.plan.episodes, state.global_step)
        self._add(state, point, {"control/seconds": time.perf_counter() - start_s})

    def _add(self, state: Any, point: LookPoint, more: dict[str, float] | None = None) -> None:
        """Logs a point, and warns or asks for the end if the rule holds at enough points in a row."""
        if point.step <= self.latest_step:
            return
        self.latest_step = point.step
        if self.start is None:
            self.start = point
        is_blind = gains_blindly(self.start, point, level=self.level, num_points=self.look.num_points)
        self.num_blind_in_a_row = self.num_blind_in_a_row + 1 if is_blind else 0
        figures = point.figures() | {"control/gains_blindly": float(is_blind)}
        with self.trainer.apart_from_training():
            self.trainer.log(figures | (more or {}))
        if self.num_blind_in_a_row < NUM_IN_A_ROW or self.look.if_blind == "none":
            return
        # a run that is done is no shorter for stopping
        if self.look.if_blind == "stop" and state.global_step < state.max_steps:
            self.stop_reason = (
                f"step {state.global_step}: {self._in_words(point)}; the run ends with a checkpoint, as "
                "--stop_if_blind stop asks; to train on all the same, pass --resume --stop_if_blind warn"
            )
        elif not self.has_warned and state.is_world_process_zero:
            logger.warning(f"\nstep {state.global_step}: {self._in_words(point)} (said once)\n")
        self.has_warned = True

    def _in_words(self, point: LookPoint) -> str:
        assert self.start is not None, "a gain has a start"
        before, now = self.start.figures(), point.figures()
        rises = {name: f"{before[f'control/{name}']:.0%} to {now[f'control/{name}']:.0%}" for name in ("true", "grey")}
        return (
            f"the policy gains without looking: on {now['control/episodes']:.0f} held-out episodes accuracy rose from "
            f"{rises['true']}, and with every picture grey from {rises['grey']}, at {NUM_IN_A_ROW} points in a row; "
            "the answer leaks into the text, so look for it in the prompt, the names and the order of the pictures"
        )
