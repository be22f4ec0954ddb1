"""Guards that keep bad numbers out of the weights: from reward functions, losses and gradients.

All processes drop, stop or skip together. They skip a step together because they all see one gradient: a loss that is
not finite makes its whole gradient NaN, and the reduction over processes carries that to each of them. DeepSpeed's
ZeRO-3 skips such a step by itself; without DeepSpeed the optimizer finds no gradient to step with.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.trainer_callback import ExportableState, TrainerCallback

from fleet.errors import RunStopped
from fleet.own_code.reward_function import MAX_REWARD
from fleet.own_code.reward_process import RewardProcess
from fleet.processes import gather_by_rank, raise_first

logger = logging.getLogger("fleet")


def without_gradient_if_not_finite(loss: Tensor) -> Tensor:
    """The loss if it is finite; else NaN, with a gradient that is NaN for every parameter.

    An infinite loss can have a finite gradient, which would pass for a sound one.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class RewardGuard:
    """A user's reward function on all processes: broken on one, it stops all; a value that is no number is dropped."""

    def __init__(self, reward: RewardProcess):
        self.reward, self._has_told = reward, False

    def __call__(self, completions: Sequence[str], step: int, **columns: Any) -> tuple[list[float], str | None]:
        """This process's B values, NaN where one is dropped, and the first that any process drops, in words.

        step: for the warning at the first of the run. Every process takes part. Raises RunStopped on all processes,
        with the first one's reason, if the function is broken on any.
        """
        checked = self.reward(completions, **columns)
        # before anything else is gathered: a process without values would leave the others waiting for them
        found_by_rank = gather_by_rank((checked.problem, checked.dropped))
        raise_first([problem for problem, _ in found_by_rank], RunStopped)
        dropped = next((f"{self.reward.__name__} gave {value}" for _, value in found_by_rank if value), None)
        if dropped is not None and not self._has_told:
            self._has_told = True
            logger.warning(
                f"step {step}: reward function {dropped}; rollouts without a finite "
                f"number within {MAX_REWARD:g} of 0 are dropped, and counted in rewards/dropped (said once)"
            )
        return checked.values, dropped


class StepGuard(TrainerCallback, ExportableState):
    """Keeps the optimizer from steps whose gradient is not finite, counts them, and ends a run that teaches nothing.

    A skipped step changes no weight, no moment of the optimizer and no learning rate. `num_skipped` counts those of
    the whole run; checkpoints keep it. After `max_in_a_row` steps in a row that were skipped, or had no group of two
    rollouts with a reward, training ends with a checkpoint and `stop_reason` says why. A shorter run with
    such steps alone ends likewise, with `has_taught` False.
    """

    def __init__(self, accelerator: Accelerator, max_in_a_row: int, may_save: Callable[[], bool]):
        """may_save: true if a checkpoint can be saved after the step just taken."""
        self.accelerator, self.max_in_a_row, self.may_save = accelerator, max_in_a_row, may_save
        self.num_skipped = self.num_in_a_row = self.num_unscored_in_a_row = 0
        # of the generation that the step uses, over all processes
        self.has_scores = True
        self.first_dropped: str | None = None
        self.stop_reason: str | None = None
        self.has_taught = True
        # of the step to come, before clipping
        self.gradient_norm = 0.0

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"args": {}, "attributes": {"num_skipped": self.num_skipped}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts on from the checkpoint."""
        kept = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.num_skipped, self.num_in_a_row, self.stop_reason = kept["attributes"]["num_skipped"], 0, None
        self.num_unscored_in_a_row = 0

    def begin_generation(self, first_dropped: str | None) -> None:
        """Notes new rollouts. first_dropped: the first value that is no reward, in words; None without one."""
        self.has_scores, self.first_dropped = False, first_dropped

    def note_scores(self, shaped_rewards_PG: Tensor) -> None:
        """Notes some of a generation's groups, of all processes; NaN where a rollout has no reward."""
        # a rollout without a scored sibling teaches nothing
        self.has_scores |= bool(((~shaped_rewards_PG.isnan()).sum(dim=1) >= 2).any())

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Takes the gradients away from a step that must be skipped."""
        is_finite = math.isfinite(self.gradient_norm)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            is_skipped = optimizer.step_was_skipped
            if not (is_finite or is_skipped):
                raise RunStopped(
                    f"step {state.global_step + 1}: DeepSpeed took a step on a gradient whose norm is "
                    f"{self.gradient_norm}, so the weights are lost; go back to the last checkpoint with --resume, and "
                    "use ZeRO-3 of deepspeed 0.19.8 or newer, which skips such a step"
                )
        else:
            own = torch.tensor(float(not is_finite), device=self.accelerator.device)
            is_skipped = self.accelerator.reduce(own, reduction="sum").item() > 0
            if is_skipped:
                for parameter in model.parameters():
                    parameter.grad = None
            # for Trainer and for accelerate's scheduler, which then leave the learning rate as it is
            optimizer._is_overflow = is_skipped
        self.num_in_a_row = self.num_in_a_row + 1 if is_skipped else 0
        if is_skipped:
            self.num_skipped += 1
            logger.warning(
                f"step {state.global_step + 1} skipped: its gradient's norm is {self.gradient_norm}; weights, "
                f"optimizer and learning rate stay as they are (skipped steps so far: {self.num_skipped})"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end after too many steps in a row that taught nothing."""
        self.num_unscored_in_a_row = 0 if self.has_scores else self.num_unscored_in_a_row + 1
        num_in_a_row = max(self.num_in_a_row, self.num_unscored_in_a_row)
        # a run shorter than the limit must not end as if it had learnt
        is_whole_run = num_in_a_row == state.global_step == state.max_steps
        if not is_whole_run and (num_in_a_row < self.max_in_a_row or not self.may_save()):
            return
        kept = f"the last checkpoint in {args.output_dir} is sound"
        self.has_taught = not is_whole_run
        go_on = "begin another run" if is_whole_run else "pass --resume"
        if self.num_in_a_row == num_in_a_row:
            self.stop_reason = (
                f"{num_in_a_row} optimizer steps in a row were skipped, as the gradient's norm was last "
                f"{self.gradient_norm}; the weights are those of step {state.global_step - num_in_a_row}, and {kept}; "
                f"look for the cause in the model, the dtype and the reward, then {go_on}"
            )
        else:
            wanted = f"reward function {self.first_dropped}, but wanted a finite number within {MAX_REWARD:g} of 0"
            why = "the KL to the reference is not finite" if self.first_dropped is None else wanted
            self.stop_reason = (
                f"{num_in_a_row} optimizer steps in a row taught nothing, as no group has two rollouts that count: "
                f"{why}; {kept}; correct that, then {go_on}"
            )
        control.should_save = control.should_training_stop = True
