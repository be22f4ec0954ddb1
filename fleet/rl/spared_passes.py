"""SparedPasses: a training pass that would teach nothing is not made, and all else moves as if it had been.

The only code that leans on how TRL counts and times micro-steps.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fleet.rl.policy_passes import PolicyPasses


class SparedPasses(PolicyPasses):
    """A trainer that leaves out the pass of a micro-batch in which no group of any device has an advantage."""

    _current_train_step_time: float  # TRL's

    def __init__(self, **everything: Any):
        """everything: of GroupSampling."""
        super().__init__(**everything)
        self._has_passed = False  # in the optimizer step under way

    def _teaches(self, inputs: dict[str, Any]) -> Sequence[bool] | None:
        """For each group of a micro-batch, False if no device's has an advantage; None if that is not known yet.

        inputs: what `_prepare_inputs` gives. The same on every rank.
        """
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's, but for a micro-step whose pass is left out: it is counted and timed as any, and its loss is 0."""
        start_s = time.perf_counter()
        model.train()
        is_left_out = self._teaches_nothing(model, self._teaches(self._prepare_inputs(inputs)))
        self._current_train_step_time += time.perf_counter() - start_s
        if not is_left_out:
            return super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        if self.accelerator.sync_gradients:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return torch.zeros((), device=self.accelerator.device)

    def _teaches_nothing(self, model: nn.Module, teaches: Sequence[bool] | None) -> bool:
        """True if the pass of this micro-batch is left out. teaches: of `_teaches`.

        An optimizer step's last pass is made if any was made before it: gradients that have accumulated are reduced
        in it. DeepSpeed always needs it, as it steps inside. Of another it must not hear, or it would add to the
        gradients of the step before. Where no pass is made gradients are 0, not absent, so that moments, decay and
        schedule move.
        """
        if self.beta != 0.0 or self.vllm is not None or teaches is None:
            return False
        is_last = self.accelerator.sync_gradients
        is_needed = any(teaches) or (is_last and (self._has_passed or self.is_deepspeed_enabled))
        self._has_passed = (is_needed or self._has_passed) and not is_last
        self._add_metrics({"groups/skipped": float(not is_needed)})
        if is_last and not is_needed:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        return not is_needed
