"""The run as asked for: flags and YAML become one checked, resolved Options.

Owns the YAML form, the defaults that depend on the case, and what numbers exclude each other. The flags themselves
are in flags.py; what a flag points to (folders, images, packages) is checked in preflight.py.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from flags import TOY_MODEL_ID, UsageError, build_parser
from reward import RewardWeights


@dataclass(frozen=True)
class Options:
    """The run as asked for. None stands for a default that resolve_options fills in, or for "no limit"."""

    model_id: str
    revision: str | None
    dtype: str | None
    attn_implementation: str
    use_lora: bool
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    merge_lora: bool
    load_in_4bit: bool
    freeze_vision: bool
    vision_cache_mib: int | None
    data_root: str
    env: str | None
    candidates_per_episode: int
    fixed_correct_index: int | None
    allow_reasoning: bool
    image_max_pixels: int | None
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
    beta: float | None
    epsilon: float
    epsilon_high: float | None
    normalize_advantages: bool
    mask_truncated_completions: bool
    gradient_checkpointing: bool | None
    temperature: float
    top_p: float
    max_completion_length: int | None
    shared_prefix: bool
    ds3_gather_for_generation: bool
    use_vllm: bool
    vllm_mode: str
    vllm_server_host: str
    vllm_server_port: int
    vllm_gpu_memory_utilization: float
    vllm_tensor_parallel_size: int
    output_dir: str | None
    overwrite: bool
    resume: bool
    seed: int
    save_steps: int
    save_total_limit: int
    logging_steps: int
    sample_steps: int
    report_to: str
    dataloader_num_workers: int
    dry_run: bool


@dataclass(frozen=True)
class ResolvedDefault:
    """One default that depended on the case, with the reason, for the start of the log."""

    flag: str
    value: Any
    reason: str


def parse_options(argv: Sequence[str]) -> Options:
    """The options of a command line, `--config` file included; flags on the command line win over the file.

    Raises UsageError for an unknown or misspelt flag or key (naming the nearest known one), a value of the wrong
    kind, or a config file that cannot be read. `--help` prints and exits, as argparse does.
    """
    parser = build_parser()
    given = vars(_parse_known(parser, argv))
    config_path = given.pop("config")
    if config_path is not None:
        file_flags = _read_config_file(parser, Path(config_path))
        given = vars(_parse_known(parser, [*file_flags, *argv]))
        given.pop("config")
    options = Options(**given)
    _refuse_impossible_numbers(options)
    return options


def resolve_options(options: Options, *, has_bf16_gpu: bool) -> tuple[Options, list[ResolvedDefault]]:
    """The options with every case-dependent default filled in, and what was filled in why.

    has_bf16_gpu: whether a GPU that computes in bfloat16 will train.
    """
    is_toy = options.model_id == TOY_MODEL_ID
    kind = "the toy model" if is_toy else "a real model"
    if options.use_lora:
        rate = (5e-4, "LoRA on the toy model") if is_toy else (1e-5, "LoRA: ten times a full fine-tune's")
    else:
        rate = (1e-4, "full fine-tune of the toy model") if is_toy else (1e-6, "full fine-tune, TRL's default")
    length = (512, "room to reason before the call") if options.allow_reasoning else (64, "a call has about 25 tokens")
    cache = (2048, "vision is frozen: features keep")
    if not options.freeze_vision and not options.use_lora:
        cache = (0, "vision trains, so features change")
    elif not options.shared_prefix:
        cache = (0, "TRL's own passes take no features")
    defaults = {
        "train_steps": (60, "the toy learns in 60") if is_toy else (200, "a real model"),
        "per_device_batch_size": (8, "the toy is small") if is_toy else (1, "one group of a real model at a time"),
        "steps_per_generation": (options.gradient_accumulation_steps, "on-policy: one optimizer step a generation"),
        "learning_rate": rate,
        "beta": (0.0, "no KL term, so no reference model in memory"),
        "dtype": ("bfloat16", "the GPU computes in it") if has_bf16_gpu else ("float32", "no GPU with bfloat16"),
        "image_max_pixels": (56 * 56, kind) if is_toy else (448 * 448, "256 tokens an image at most"),
        "vision_cache_mib": cache,
        "max_completion_length": (32, "a toy call has 20 tokens") if is_toy else length,
        "gradient_checkpointing": (False, kind) if is_toy else (True, "memory before speed for a real model"),
    }
    filled = [
        ResolvedDefault(flag, value, reason)
        for flag, (value, reason) in defaults.items()
        if getattr(options, flag) is None
    ]
    return replace(options, **{default.flag: default.value for default in filled}), filled


def _parse_known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UsageError(f"unknown flag {flag}{_nearest(flag, [f'--{name}' for name in vars(namespace)])}; see --help")
    return namespace


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _read_config_file(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The file's settings as command-line flags, so that they meet the same checks."""
    if not path.is_file():
        raise UsageError(f"config file {path} does not exist; correct --config")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_LoaderOfUniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"config file {path} is not YAML: {reason}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"config file {path} holds a {type(settings).__name__}, wanted lines of 'flag: value'")
    known = [field.name for field in fields(Options)]
    flags: list[str] = []
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"config file {path}: unknown key {key!r}{_nearest(str(key), known)}; see --help")
        if isinstance(value, (dict, list)):
            raise UsageError(f"config file {path}: {key} is a {type(value).__name__}, wanted one value")
        if value is not None or key == "fixed_correct_index":
            flags.append(f"--{key}={_as_flag_value(value)}")
    try:
        parser.parse_args(flags)
    except UsageError as error:
        raise UsageError(f"config file {path}: {error}") from error
    return flags


class _LoaderOfUniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error, not the last one's win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


def _as_flag_value(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


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
        "max_completion_length",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "vllm_tensor_parallel_size",
    )
    above_zero = ("learning_rate", "temperature", "max_grad_norm", "reward_correct", "epsilon", "epsilon_high")
    at_least_zero = (
        "warmup_steps",
        "weight_decay",
        "beta",
        "reward_valid_call",
        "sample_steps",
        "lora_dropout",
        "dataloader_num_workers",
        "seed",
        "vision_cache_mib",
    )
    _require(options, at_least_one, "at least 1", lambda value: value >= 1)
    _require(options, above_zero, "above 0", lambda value: value > 0)
    _require(options, at_least_zero, "at least 0", lambda value: value >= 0)
    _require(options, ("image_max_pixels",), "at least 784 (28x28 pixels)", lambda value: value >= 784)
    _require(options, ("lora_dropout",), "below 1", lambda value: value < 1)
    # numpy takes 32 bits, and every process adds its rank
    _require(options, ("train_steps",), "at most 10,000,000", lambda value: value <= 10_000_000)
    _require(options, ("seed",), "below 2147483648", lambda value: value < 2**31)
    _require(options, ("vllm_server_port",), "from 1 to 65535", lambda value: 1 <= value <= 65535)
    _require(options, ("top_p", "vllm_gpu_memory_utilization"), "above 0 and at most 1", lambda value: 0 < value <= 1)
    try:
        RewardWeights(options.reward_correct, options.reward_valid_call)
    except ValueError as error:
        raise UsageError(f"reward_correct, reward_valid_call: {error}") from error
    if options.steps_per_generation and options.steps_per_generation % options.gradient_accumulation_steps:
        raise UsageError(
            f"steps_per_generation={options.steps_per_generation} is not a multiple of gradient_accumulation_steps="
            f"{options.gradient_accumulation_steps}, so a step would mix two generations; make it one"
        )
    if options.vision_cache_mib and not (options.freeze_vision or options.use_lora):
        raise UsageError(
            f"vision_cache_mib={options.vision_cache_mib}, but the vision tower trains, so features change with every "
            "step; add --freeze_vision true or drop --vision_cache_mib"
        )
    if options.vision_cache_mib and not options.shared_prefix:
        raise UsageError(
            f"vision_cache_mib={options.vision_cache_mib}, but TRL's own passes take no features; drop "
            "--vision_cache_mib or --shared_prefix false"
        )
    if options.load_in_4bit and not options.use_lora:
        raise UsageError("load_in_4bit=true, but 4-bit weights cannot be trained themselves; add --use_lora true")
    if options.merge_lora and not options.use_lora:
        raise UsageError("merge_lora=true, but there is no adapter to merge; add --use_lora true or drop --merge_lora")
    if options.warmup_steps and options.lr_scheduler_type == "constant":
        raise UsageError(
            f"warmup_steps={options.warmup_steps}, but the schedule 'constant' does not warm up; "
            "add --lr_scheduler_type constant_with_warmup"
        )
    if options.resume and options.overwrite:
        raise UsageError("resume and overwrite are both given, but one keeps the run and one deletes it; drop one")
    if options.resume and options.output_dir is None:
        raise UsageError("resume is given without output_dir; pass --output_dir with the run to continue")


def _require(options: Options, names: Sequence[str], wanted: str, is_fine: Callable[[float], bool]) -> None:
    for name in names:
        value = getattr(options, name)
        is_finite = not isinstance(value, float) or math.isfinite(value)
        if value is not None and not (is_finite and is_fine(value)):
            raise UsageError(f"{name}={value}, but it must be {wanted}; correct --{name}")
