"""The two trainers that step_time.py compares, with a stopwatch in them, and the turnstile they take turns at."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import RLOOTrainer

from fleet.qwen.edge_scores import Scores
from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer

Tally = defaultdict[str, float]


class Stopwatch:
    """Seconds by phase, and what passed through the model, of the step that is under way."""

    def __init__(self) -> None:
        self.seconds: Tally = defaultdict(float)
        self.amounts: Tally = defaultdict(float)
        self.steps: list[tuple[Tally, Tally]] = []
        self.phase: str | None = None

    @contextlib.contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        start_s, self.phase = now_s(), phase
        try:
            yield
        finally:
            self.seconds[phase] += now_s() - start_s
            self.phase = None

    def end_step(self) -> None:
        self.steps.append((self.seconds, self.amounts))
        self.seconds, self.amounts = defaultdict(float), defaultdict(float)

    def count_amounts(self, model: torch.nn.Module) -> None:
        """Counts the tokens and image patches that enter the model from now on."""

        def of_text(module: Any, args: Any, kwargs: Any) -> None:
            self.amounts["generation_forwards"] += self.phase == "generate"
            self.amounts["tokens"] += kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]

        def of_vision(module: Any, args: Any, kwargs: Any) -> None:
            self.amounts["patches"] += (args[0] if args else kwargs["hidden_states"]).shape[0]

        for name, module in model.named_modules():
            if name.endswith("model.language_model"):
                module.register_forward_pre_hook(of_text, with_kwargs=True)
            elif name.endswith("model.visual"):
                module.register_forward_pre_hook(of_vision, with_kwargs=True)


def now_s() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Turnstile:
    """Lets the steps of several training loops through one at a time, in order."""

    def __init__(self, names: list[str]):
        self.names = names
        self.turn = 0
        self.changed = threading.Condition()

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.names[self.turn % len(self.names)] in (name, "all"))

    def advance(self) -> None:
        with self.changed:
            self.turn += 1
            self.changed.notify_all()

    def open(self) -> None:
        """Lets everyone through, for good."""
        with self.changed:
            self.names = ["all"]
            self.changed.notify_all()


class StepClock(TrainerCallback):
    """Times whole steps, the fetching of their batch included, between the turns of a turnstile."""

    def __init__(self, name: str, turnstile: Turnstile, stopwatch: Stopwatch):
        self.name, self.turnstile, self.stopwatch = name, turnstile, stopwatch
        self.model: torch.nn.Module | None = None
        self.first_gradients: dict[str, Tensor] = {}
        self.turnstile_wait()

    def turnstile_wait(self) -> None:
        self.turnstile.wait(self.name)
        self.start_s = now_s()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopwatch.seconds["waiting"] += now_s() - self.start_s

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.first_gradients = {
                name: parameter.grad.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        self.optimizer_start_s = now_s()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopwatch.seconds["optimizer"] += now_s() - self.optimizer_start_s

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopwatch.seconds["step"] = now_s() - self.start_s
        self.stopwatch.end_step()
        self.turnstile.advance()
        self.turnstile_wait()


def reward_of_tokens(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Rewards from the completions' tokens alone, for both trainers."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


class TimedMixin:
    """What both timed trainers share: the phases of a step."""

    stopwatch: Stopwatch
    # by the completion's tokens, as TRL shuffles its rows; of several such, in the order of their sums
    first_logps: dict[tuple[int, ...], Tensor] | None = None
    first_completions: list[list[int]] | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        before = self.stopwatch.seconds["prepare_and_model"]
        with self.stopwatch.timing("training_step"):
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        in_preparation = self.stopwatch.seconds["prepare_and_model"] - before
        self.stopwatch.seconds["train"] += self.stopwatch.seconds.pop("training_step") - in_preparation
        return loss

    def _prepare_inputs(self, batch: Any) -> Any:
        with self.stopwatch.timing("prepare_and_model"):
            return super()._prepare_inputs(batch)  # type: ignore[misc]

    def keep_first_logps(self, completion_ids_BT: Tensor, logps_BT: Tensor) -> None:
        if self.first_logps is None:
            found: dict[tuple[int, ...], list[Tensor]] = {}
            for ids, logps in zip(completion_ids_BT.tolist(), logps_BT.detach().clone(), strict=True):
                found.setdefault(tuple(ids), []).append(logps)
            self.first_logps = {
                ids: torch.stack(sorted(rows, key=lambda logps: logps.sum().item())) for ids, rows in found.items()
            }


class TimedStock(TimedMixin, RLOOTrainer):
    """Stock TRL with a stopwatch; its first step takes the completions that Fleet's first step had."""

    def _generate_single_turn(self, *args: Any) -> list[list[int]]:
        with self.stopwatch.timing("generate"):
            completions = super()._generate_single_turn(*args)
        given, self.first_completions = self.first_completions, None
        return given or completions

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            self.keep_first_logps(args[1][:, -args[3] :], found[0])
            return found
        with self.stopwatch.timing("score"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class TimedFleet(TimedMixin, FleetRLOOTrainer):
    """Fleet's trainer with a stopwatch."""

    takes_one_pass = True

    def _tries_one_pass(self) -> bool:
        return self.takes_one_pass and super()._tries_one_pass()

    def _teaches_nothing(self, *args: Any) -> bool:
        # steps are compared whole
        return False

    def _image_features(self, *args: Any) -> Any:
        with self.stopwatch.timing("generate"):
            return super()._image_features(*args)

    def _draw(self, *args: Any) -> Drawn:
        with self.stopwatch.timing("generate"):
            drawn = super()._draw(*args)
        if self.first_completions is None:
            self.first_completions = drawn.completion_ids
        return drawn

    def _score(self, *args: Any) -> Scores:
        with self.stopwatch.timing("score"):
            return super()._score(*args)

    def _completion_logps(self, model: Any, sampled: Any, groups: slice) -> Any:
        found = super()._completion_logps(model, sampled, groups)
        if torch.is_grad_enabled():
            self.keep_first_logps(sampled.completion_ids_BT, found.logps)
        return found
