"""What the tests with real models share: the toy model, a data set on it, and a trainer of either kind."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from dataset import RepeatableEpisodeDataset
from environment import PickImageEnv
from fleet.own_code.reward_function import CheckedRewards, checked_call, name_of
from fleet.own_code.reward_process import RewardProcess
from fleet.qwen.group_passes import base_qwen
from fleet.rl.drawing import Drawn
from fleet.rl.settings import TrainerSettings
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS, toy_model_path
from model_utils import load_processor, load_qwen25_vl
from reward import make_trl_reward_function
from utils.tool_calls import make_tool_call_str

REPOSITORY = Path(__file__).resolve().parent.parent


@functools.cache
def toy_path() -> str:
    return str(toy_model_path())


@functools.cache
def toy_processor() -> Any:
    return load_processor(toy_path())


def toy_config() -> Any:
    """The toy's configuration as its folder has it, without what loading adds."""
    return AutoConfig.from_pretrained(toy_path())


def toy_model(**kwargs: Any) -> Any:
    return load_qwen25_vl(toy_path(), **kwargs)[0]


def toy_dataset(candidates: int = 4, fixed_correct_index: int | None = 0, seed: int = 0) -> RepeatableEpisodeDataset:
    env = PickImageEnv(TOY_DATA_ROOT, candidates, fixed_correct_index, seed)
    return RepeatableEpisodeDataset(env, TOY_IMAGE_PIXELS)


def rloo_config(output_dir: Path, **changes: Any) -> RLOOConfig:
    """Two episodes of four rollouts a step on the CPU in float32, nothing saved."""
    settings: dict[str, Any] = {
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "max_completion_length": 32,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return RLOOConfig(output_dir=str(output_dir), **(settings | changes))


def scripted_completions(num_rollouts_per_group: int, num_rows: int, num_generations_done: int) -> list[list[int]]:
    """Token ids that depend on nothing but place: right, wrong, out of range and unparsable answers of odd lengths."""
    texts = [make_tool_call_str(0), make_tool_call_str(1), "no call", make_tool_call_str(7), make_tool_call_str(2)]
    tokenizer = toy_processor().tokenizer
    rows = [(row % num_rollouts_per_group) * 2 + row // num_rollouts_per_group for row in range(num_rows)]
    return [
        # every third completion has no end: it hit the length limit
        tokenizer(texts[(row + num_generations_done) % 5] + ("<|im_end|>" if place % 3 else ""))["input_ids"]
        for place, row in enumerate(rows)
    ]


class ScriptedFleetTrainer(FleetRLOOTrainer):
    """The real trainer with its sampling replaced by a script."""

    num_generations_done = 0

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        self.num_generations_done += 1
        num_rows = len(batch["episodes"]) * self.num_generations
        return Drawn(scripted_completions(self.num_generations, num_rows, self.num_generations_done))


class ScriptedStockTrainer(RLOOTrainer):
    """TRL's own trainer with the same script."""

    num_generations_done = 0

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list[list[int]]:
        self.num_generations_done += 1
        return scripted_completions(self.num_generations, len(prompt_ids), self.num_generations_done)


class PlainReward:
    """A plain function as a reward that training calls, in this process."""

    def __init__(self, function: Callable[..., Any]):
        self.function, self.__name__ = function, name_of(function)

    def __call__(self, completions: Sequence[str], **columns: Any) -> CheckedRewards:
        return checked_call(self.function, self.__name__, list(completions), columns)


def fleet_trainer(
    args: RLOOConfig,
    trainer_class: type[FleetRLOOTrainer] = FleetRLOOTrainer,
    peft_config: Any = None,
    model: Any = None,
    dataset: RepeatableEpisodeDataset | None = None,
    reward_function: Callable[..., Any] | None = None,
    **settings: Any,
) -> FleetRLOOTrainer:
    """reward_function: a plain one, or that of a file. settings: TrainerSettings' fields."""
    reward: Any = reward_function
    if reward_function is not None and not isinstance(reward_function, RewardProcess):
        reward = PlainReward(reward_function)
    return trainer_class(
        toy_model() if model is None else model,
        args,
        dataset or toy_dataset(),
        toy_processor(),
        TrainerSettings(**settings),
        peft_config=peft_config,
        reward_function=reward,
    )


def stock_trainer(
    args: RLOOConfig,
    peft_config: Any = None,
    num_episodes: int = 64,
    model: Any = None,
    trainer_class: type[RLOOTrainer] | None = None,
) -> RLOOTrainer:
    return (trainer_class or ScriptedStockTrainer)(
        model=toy_model() if model is None else model,
        reward_funcs=make_trl_reward_function(),
        args=args,
        train_dataset=toy_dataset().as_hf_dataset(num_episodes),
        processing_class=toy_processor(),
        peft_config=peft_config,
    )


class StepKeeper(TrainerCallback):
    """Keeps what a step may change, as it was before the first step and after each: weights, moments, learning rate."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.moments: list[list[torch.Tensor]] = []
        self.learning_rates: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(**kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep(**kwargs)

    def _keep(self, model: Any, optimizer: Any, **kwargs: Any) -> None:
        # ZeRO-3 leaves a process its shard of each weight
        weights = model.named_parameters()
        self.weights.append({name: getattr(weight, "ds_tensor", weight).detach().clone() for name, weight in weights})
        wrapped = optimizer
        while hasattr(wrapped, "optimizer"):
            wrapped = wrapped.optimizer
        states = wrapped.state.values()
        self.moments.append(
            [moment.clone() for state in states for moment in state.values() if torch.is_tensor(moment)]
        )
        self.learning_rates.append(optimizer.param_groups[0]["lr"])


def spoil(trainer: FleetRLOOTrainer, faults: dict[int, tuple[str, float]]) -> None:
    """Multiplies what training passes by the last norm, forward or its gradient, by a factor at these steps.

    faults: by step from 1, ("forward" or "gradient", factor); in the step's first micro-batch alone.
    """
    seen: set[int] = set()

    def multiply(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        step = trainer.state.global_step + 1
        if not torch.is_grad_enabled() or step not in faults or step in seen:
            return None
        seen.add(step)
        direction, factor = faults[step]
        if direction == "forward":
            return output * factor
        output.register_hook(lambda gradient: gradient * factor)
        return None

    policy = trainer.accelerator.unwrap_model(trainer.model)
    base_qwen(policy).model.language_model.norm.register_forward_hook(multiply)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
