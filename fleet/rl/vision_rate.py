"""VisionRate: a Trainer whose optimizer moves the vision side, tower and merger, at a learning rate of its own.

The only code that leans on the groups of weights in Trainer's optimizer. Each of them is cut in two, so that weight
decay stays as Trainer has it, and the schedule scales all of them. Without such a rate nothing is cut.
"""

from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from fleet.model_folder.parts import VISION_PARTS, part_of_weight
from fleet.rl.resumable_trainer import ResumableTrainer


class VisionRate(ResumableTrainer):
    """A trainer that logs `vision_learning_rate` beside Trainer's `learning_rate`, which is then of the rest."""

    def __init__(self, *args: Any, vision_learning_rate: float | None = None, **kwargs: Any):
        """vision_learning_rate: None for Trainer's one rate. The others are ResumableTrainer's."""
        super().__init__(*args, **kwargs)
        self.vision_learning_rate = vision_learning_rate
        self._latest_rate = LatestRate()
        self.add_callback(self._latest_rate)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, in whose last groups the vision side is."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.vision_learning_rate is not None:
            weights = (self.model if model is None else model).named_parameters()
            vision = {weight for name, weight in weights if part_of_weight(name) in VISION_PARTS}
            give_own_rate(optimizer, vision, self.vision_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log of a step, with the rate that the vision side moved at."""
        if self.vision_learning_rate is not None and "learning_rate" in logs:
            logs["vision_learning_rate"] = self._latest_rate.of_last_group
        super().log(logs, start_time)


class LatestRate(TrainerCallback):
    """Notes the rate at which an optimizer step moved the last group, before the schedule moves on."""

    of_last_group = 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        """Reads it from the optimizer."""
        self.of_last_group = float(optimizer.param_groups[-1]["lr"])


def give_own_rate(optimizer: torch.optim.Optimizer, weights: set[torch.nn.Parameter], rate: float) -> None:
    """Moves these weights into groups of their own, last, which differ from those they were in by this rate alone."""
    for group in list(optimizer.param_groups):
        own = [weight for weight in group["params"] if weight in weights]
        group["params"] = [weight for weight in group["params"] if weight not in weights]
        if own:
            optimizer.add_param_group({**group, "params": own, "lr": rate})
