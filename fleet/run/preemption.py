"""The end of a run between two steps, at SIGTERM or SIGINT, or when another run has taken over its folder.

A signalled run finishes its step, saves on all processes, and exits with a code. A scheduler sends SIGTERM to one
process or to all. A second signal exits at once. Before the first step and after the last, signals act as always.
"""

import logging
import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from fleet.errors import RunStopped
from fleet.rl.checkpoints import DISPLACED_REMEDY

logger = logging.getLogger("fleet")

HANDLED = (signal.SIGTERM, signal.SIGINT)
SAME_SIGNAL_S = 1.0  # a launcher passes on a signal that its workers may have had already: these two are one


class Preemption(TrainerCallback):
    """Stops the training loop, with a checkpoint, at the end of the step in which any process was signalled."""

    def __init__(self, trainer: Any):
        """trainer: a FleetRLOOTrainer."""
        self.trainer = trainer
        self.is_stopping = False  # True once all processes have agreed to stop
        self._signal: int | None = None
        self._signal_time_s = 0.0
        self._handlers_before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the signals over."""
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in HANDLED}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the signals back; one that came too late to be agreed on has its usual effect now."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        if self._signal is not None and not self.is_stopping:
            signal.raise_signal(self._signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Has the loop save and stop, if any process was signalled and the step ends its generation."""
        if self._agree_to_stop():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops at once for a signal during the save, as all has just been saved."""
        if self._agree_to_stop():
            control.should_training_stop = True

    def _agree_to_stop(self) -> bool:
        """True, on all processes, if any was signalled and the step ends its generation."""
        displaced_by = self.trainer.displaced_by()
        own = [float(self._signal is not None), float(displaced_by is not None)]
        flags = torch.tensor(own, device=self.trainer.accelerator.device)
        is_any, is_displaced = (bool(flag) for flag in self.trainer.accelerator.reduce(flags, reduction="sum").tolist())
        if is_displaced:
            raise RunStopped(
                f"{self.trainer.args.output_dir} was taken over by {displaced_by}; {DISPLACED_REMEDY}", can_resume=False
            )
        if is_any and not self.is_stopping:
            logger.warning("told to stop: this step is finished and saved first; a second signal stops at once")
        self.is_stopping = is_any
        return is_any and self.trainer.is_at_generation_end()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._signal is None:
            self._signal, self._signal_time_s = number, now_s
        elif now_s - self._signal_time_s > SAME_SIGNAL_S:
            os._exit(128 + number)
