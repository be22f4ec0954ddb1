"""The run as asked for: flags and YAML become one checked, resolved Options.

Owns the defaults that depend on the case, and what numbers exclude each other. The flags themselves are in flags.py
and training_flags.py, which of them do nothing beside which in idle_flags.py; what a flag points to (folders, images,
packages) is checked in preflight.py.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fleet.command.flags import TOY_MODEL_ID, parse_flags
from fleet.command.idle_flags import IDLE_IN_TRAINING, refuse_idle
from fleet.command.training_flags import build_parser
from fleet.errors import UsageError
from fleet.schedule import optimizer_steps_per_generation
from reward import RewardWeights


@dataclass(frozen=True)
class SharedOptions:
    """What training and evaluation both ask. None stands for a default that is filled in, or for "no limit"."""

    model_id: str
    revision: str | None
    dtype: str | None
    attn_implementation: str
    load_in_4bit: bool
    data_root: str
    bad_images: str
    env: str | None
    candidates_per_episode: int
    fixed_correct_index: int | None
    allow_reasoning: bool
    image_max_pixels: int | None
    temperature: float
    top_p: float
    max_completion_length: int | None
    ds3_gather_for_generation: bool
    eval_episodes: int
    eval_seed: int
    seed: int


@dataclass(frozen=True)
class Options(SharedOptions):
    """A training run as asked for."""

    use_lora: bool
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    merge_lora: bool
    freeze_vision: bool
    vision_cache_mib: int | None
    reward: str | None
    reward_timeout_s: float
    reward_correct: float
    reward_valid_call: float
    train_steps: int | None
    num_rollouts: int
    per_device_batch_size: int | None
    gradient_accumulation_steps: int
    steps_per_generation: int | None
    num_iterations: int
    learning_rate: float | None
    lr_scheduler_type: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    max_skipped_steps: int
    beta: float | None
    epsilon: float
    epsilon_high: float | None
    normalize_advantages: bool
    mask_truncated_completions: bool
    gradient_checkpointing: bool | None
    shared_prefix: bool
    use_vllm: bool
    vllm_mode: str
    vllm_server_host: str
    vllm_server_port: int
    vllm_gpu_memory_utilization: float
    vllm_tensor_parallel_size: int
    vllm_max_logprob_gap: float
    eval_steps: int
    keep_best: bool
    output_dir: str | None
    overwrite: bool
    resume: bool | str
    trust_checkpoint: bool
    save_steps: int
    save_total_limit: int
    logging_steps: int
    sample_steps: int
    report_to: str
    dataloader_num_workers: int
    step_timeout_s: float
    dry_run: bool


AnyOptions = TypeVar("AnyOptions", bound=SharedOptions)


@dataclass(frozen=True)
class ResolvedDefault:
    """One default that depended on the case, with the reason, for the start of the log."""

    flag: str
    value: Any
    reason: str


def parse_options(argv: Sequence[str], launch_variables: Mapping[str, str] = os.environ) -> Options:
    """The options of a command line, `--config` file included; flags on the command line win over the file.

    launch_variables: what the launcher put into the process environment. Raises UsageError for an unknown or misspelt
    flag or key (naming the nearest known one), a value of the wrong kind, a flag that would do nothing beside the
    others, or a config file that cannot be read. `--help` prints and exits, as argparse does.
    """
    flags = parse_flags(build_parser(), argv)
    options = Options(**flags.values)
    refuse_impossible_shared_numbers(options)
    _refuse_impossible_numbers(options)
    refuse_idle(IDLE_IN_TRAINING, options, flags.given, launch_variables)
    return options


def starts_sighted(options: SharedOptions) -> bool:
    """Whether the toy of this task is the sighted one: only where pictures are asked for by name does sight help."""
    is_toy = options.model_id == TOY_MODEL_ID
    return is_toy and options.env is None and options.fixed_correct_index is None


def resolve_shared(options: SharedOptions, *, has_bf16_gpu: bool) -> dict[str, tuple[Any, str]]:
    """The case-dependent defaults that training and evaluation share, each with its reason."""
    is_toy = options.model_id == TOY_MODEL_ID
    length = (512, "room to reason before the call") if options.allow_reasoning else (64, "a call has about 25 tokens")
    return {
        "dtype": ("bfloat16", "the GPU or accelerate says so") if has_bf16_gpu else ("float32", "no GPU with bfloat16"),
        "image_max_pixels": (56 * 56, "the toy model") if is_toy else (448 * 448, "256 tokens an image at most"),
        "max_completion_length": (32, "a toy call has 20 tokens") if is_toy else length,
    }


def fill_in(options: AnyOptions, defaults: dict[str, tuple[Any, str]]) -> tuple[AnyOptions, list[ResolvedDefault]]:
    """The options with these defaults where nothing was given, and what was filled in why."""
    filled = [
        ResolvedDefault(flag, value, reason)
        for flag, (value, reason) in defaults.items()
        if getattr(options, flag) is None
    ]
    return replace(options, **{default.flag: default.value for default in filled}), filled


def resolve_options(options: Options, *, has_bf16_gpu: bool) -> tuple[Options, list[ResolvedDefault]]:
    """The options with every case-dependent default filled in, and what was filled in why.

    has_bf16_gpu: whether a GPU that computes in bfloat16 will train.
    """
    is_toy = options.model_id == TOY_MODEL_ID
    must_look = starts_sighted(options)
    kind = "the toy model" if is_toy else "a real model"
    if options.use_lora:
        rate = (5e-4, "LoRA on the toy model") if is_toy else (1e-5, "LoRA: ten times a full fine-tune's")
    else:
        rate = (1e-6, "full fine-tune, TRL's default")
        if is_toy:
            rate = (2e-4, "full fine-tune of the sighted toy") if must_look else (1e-4, "full fine-tune of the toy")
    num_steps, num_episodes = (200, "a real model"), (1, "one group of a real model at a time")
    if is_toy:
        num_steps = (100, "the toy learns to look in 100") if must_look else (60, "the toy learns in 60")
        num_episodes = (16, "looking takes many episodes") if must_look else (8, "the toy is small")
    cache = (2048, "vision is frozen: features keep")
    if not options.freeze_vision and not options.use_lora:
        cache = (0, "vision trains, so features change")
    elif not options.shared_prefix:
        cache = (0, "TRL's own passes take no features")
    defaults = {
        "train_steps": num_steps,
        "per_device_batch_size": num_episodes,
        "steps_per_generation": (options.gradient_accumulation_steps, "on-policy: one optimizer step a generation"),
        "learning_rate": rate,
        "beta": (0.0, "no KL term, so no reference model in memory"),
        "vision_cache_mib": cache,
        "gradient_checkpointing": (False, kind) if is_toy else (True, "memory before speed for a real model"),
    }
    return fill_in(options, resolve_shared(options, has_bf16_gpu=has_bf16_gpu) | defaults)


def refuse_impossible_shared_numbers(options: SharedOptions) -> None:
    """Raises UsageError for numbers that neither training nor evaluation can have, whatever the files say."""
    require_numbers(options, ("max_completion_length", "eval_episodes"), "at least 1", lambda value: value >= 1)
    require_numbers(options, ("temperature",), "above 0", lambda value: value > 0)
    require_numbers(options, ("top_p",), "above 0 and at most 1", lambda value: 0 < value <= 1)
    require_numbers(options, ("image_max_pixels",), "at least 784 (28x28 pixels)", lambda value: value >= 784)
    require_numbers(options, ("eval_seed",), "from 0 to 2147483647", lambda value: 0 <= value < 2**31)


def _refuse_impossible_numbers(options: Options) -> None:
    """Raises UsageError for numbers that no run can have, whatever the files say."""
    if options.num_rollouts < 2:
        raise UsageError(
            f"num_rollouts={options.num_rollouts}, but leave-one-out needs at least 2 rollouts per episode; "
            "pass --num_rollouts 4"
        )
    at_least_one = (
        "train_steps",
        "per_device_batch_size",
        "gradient_accumulation_steps",
        "steps_per_generation",
        "num_iterations",
        "lora_rank",
        "lora_alpha",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "max_skipped_steps",
        "vllm_tensor_parallel_size",
    )
    above_zero = (
        "learning_rate", "max_grad_norm", "reward_correct", "epsilon", "epsilon_high", "vllm_max_logprob_gap"
    )  # fmt: skip
    at_least_zero = (
        "warmup_steps",
        "weight_decay",
        "beta",
        "reward_valid_call",
        "sample_steps",
        "eval_steps",
        "lora_dropout",
        "dataloader_num_workers",
        "seed",
        "vision_cache_mib",
    )
    require_numbers(options, at_least_one, "at least 1", lambda value: value >= 1)
    require_numbers(options, above_zero, "above 0", lambda value: value > 0)
    require_numbers(options, at_least_zero, "at least 0", lambda value: value >= 0)
    require_numbers(options, ("step_timeout_s",), "at least 10 seconds", lambda value: value >= 10)
    require_numbers(options, ("reward_timeout_s",), "above 0", lambda value: value > 0)
    if options.reward_timeout_s >= options.step_timeout_s:
        raise UsageError(
            f"reward_timeout_s={options.reward_timeout_s:g} is not below step_timeout_s={options.step_timeout_s:g}, "
            "which would end the run first; lower one or raise the other"
        )
    require_numbers(options, ("lora_dropout",), "below 1", lambda value: value < 1)
    # numpy takes 32 bits, and every process adds its rank
    require_numbers(options, ("train_steps",), "at most 10,000,000", lambda value: value <= 10_000_000)
    require_numbers(options, ("seed",), "below 2147483648", lambda value: value < 2**31)
    require_numbers(options, ("vllm_server_port",), "from 1 to 65535", lambda value: 1 <= value <= 65535)
    require_numbers(options, ("vllm_gpu_memory_utilization",), "above 0 and at most 1", lambda value: 0 < value <= 1)
    try:
        RewardWeights(options.reward_correct, options.reward_valid_call)
    except ValueError as error:
        raise UsageError(f"reward_correct, reward_valid_call: {error}") from error
    if options.steps_per_generation and options.steps_per_generation % options.gradient_accumulation_steps:
        raise UsageError(
            f"steps_per_generation={options.steps_per_generation} is not a multiple of gradient_accumulation_steps="
            f"{options.gradient_accumulation_steps}, so a step would mix two generations; make it one"
        )
    if options.load_in_4bit and not options.use_lora:
        raise UsageError("load_in_4bit=true, but 4-bit weights cannot be trained themselves; add --use_lora true")
    if options.eval_steps and options.eval_seed == options.seed:
        raise UsageError(
            f"eval_seed={options.eval_seed} is the run's own seed, so it would be evaluated on its training episodes; "
            "pass another --eval_seed"
        )
    if options.keep_best and options.save_total_limit == 1:
        raise UsageError(
            "keep_best=true with save_total_limit=1 would leave no place for the newest checkpoint; pass "
            "--save_total_limit 2"
        )
    _refuse_best_between_saves(options)
    if options.resume and options.overwrite:
        raise UsageError("resume and overwrite are both given, but one keeps the run and one deletes it; drop one")
    if options.resume and options.output_dir is None:
        raise UsageError("resume is given without output_dir; pass --output_dir with the run to continue")


def _refuse_best_between_saves(options: Options) -> None:
    """Raises UsageError if the best checkpoint could fall into the middle of a generation, where nothing is saved."""
    cycle = optimizer_steps_per_generation(
        options.steps_per_generation or options.gradient_accumulation_steps,
        options.num_iterations,
        options.gradient_accumulation_steps,
    )
    if not options.keep_best or cycle == 1:
        return
    for flag, value in (("eval_steps", options.eval_steps), ("train_steps", options.train_steps)):
        if value is not None and value % cycle:
            raise UsageError(
                f"keep_best=true, but {flag}={value} is not a multiple of the {cycle} optimizer steps that a "
                "generation serves, between which nothing is saved; make it one"
            )


def require_numbers(
    options: SharedOptions, names: Sequence[str], wanted: str, is_fine: Callable[[float], bool]
) -> None:
    """Raises UsageError if one of these options has a number that is not finite or not fine."""
    for name in names:
        value = getattr(options, name)
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if value is not None and not (is_finite and is_fine(value)):
            raise UsageError(f"{name}={str(value)[:40]}, but it must be {wanted}; correct --{name}")
