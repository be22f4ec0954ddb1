"""The flags that do nothing beside others, and why: a table for training and one for evaluation.

A given flag that would do nothing is refused, as its user would believe that it works. One that was not given is null
in config.json and listed under idle_flags there, as its default has no part in the run. Imports no torch.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.command.data_sets import COLUMN_FLAGS, is_data_set
from fleet.command.flags import TOY_MODEL_ID
from fleet.command.parser import as_flag_value
from fleet.errors import UsageError
from fleet.model_folder.files import base_of, is_adapter, read_json
from fleet.model_folder.parts import VISION_PARTS


@dataclass(frozen=True)
class IdleFlags:
    """Flags that do nothing in some runs.

    are_idle: true where they do nothing, given the options and the launcher's variables. remedy: what puts them to use.
    off: the value that asks for nothing, and so may always be given.
    """

    flags: tuple[str, ...]
    are_idle: Callable[[Any, Mapping[str, str]], bool]
    reason: str
    remedy: str
    off: Any = None


LORA = ("lora_targets", "lora_rank", "lora_alpha", "lora_dropout")
VLLM = (
    "vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size",
    "vllm_max_logprob_gap", "vllm_max_model_length", "rollout_correction_cap",
)  # fmt: skip
COLOCATED = "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_max_model_length"


def is_zero3(launch_variables: Mapping[str, str]) -> bool:
    """True if the launcher was told to shard weights by DeepSpeed ZeRO-3."""
    if launch_variables.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return False
    path = launch_variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none" or not Path(path).is_file():
        return launch_variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3"
    sharding = read_json(Path(path)).get("zero_optimization")
    return isinstance(sharding, dict) and str(sharding.get("stage")) == "3"


def _is_from_hub(model_id: str) -> bool:
    base = base_of(model_id)
    return base != TOY_MODEL_ID and not Path(base).is_dir()


def _trains_vision(options: Any) -> bool:
    return bool(options.trained_parts & VISION_PARTS)


NOT_FROM_HUB = "only a hub model has revisions", "pass a hub id as the model"
NOT_SHARDED = "weights are sharded under DeepSpeed ZeRO-3 alone", "launch with --config_file accelerate_config.yaml"

ONE_TURN = IdleFlags(
    ("max_context_length",),
    lambda options, launch: options.max_turns == 1,
    "a conversation of one turn ends with it",
    "add --max_turns 2",
)
NO_ENV_ARGS = IdleFlags(
    ("env_args",),
    lambda options, launch: options.env is None,
    "PickImageEnv takes its arguments from flags of their names",
    "add --env FILE:CLASS",
)

NO_COLUMNS = IdleFlags(
    COLUMN_FLAGS,
    lambda options, launch: not is_data_set(options.data_root),
    "a folder of images has no columns, and its splits are folders",
    "pass a data set, or the split's own folder, as --data_root",
)


def _has_no_look_curve(options: Any, launch_variables: Mapping[str, str]) -> bool:
    return not (options.eval_steps if options.control_steps is None else options.control_steps)


NO_LOOK_CURVE = "no look curve is taken", "add --control_steps 50"

# fmt: off
IDLE_IN_TRAINING = (
    IdleFlags(("revision",), lambda options, launch: not _is_from_hub(options.model_id), *NOT_FROM_HUB),
    NO_ENV_ARGS,
    NO_COLUMNS,
    ONE_TURN,
    IdleFlags(LORA, lambda options, launch: not options.use_lora, "no adapter is trained", "add --use_lora true"),
    IdleFlags(LORA, lambda options, launch: options.use_lora and is_adapter(options.model_id),
        "the adapter in --model_id keeps its own", "pass its base model as --model_id"),
    IdleFlags(("merge_lora",), lambda options, launch: not options.use_lora, "there is no adapter to merge",
        "add --use_lora true", off=False),
    IdleFlags(("freeze",), lambda options, launch: options.use_lora, "LoRA freezes every weight but its adapters'",
        "choose their parts by --lora_targets"),
    IdleFlags(("vision_learning_rate",), lambda options, launch: not _trains_vision(options),
        "nothing of the vision side trains", "let some of it train (see --freeze and --lora_targets)"),
    IdleFlags(("vision_learning_rate",), lambda options, launch: options.trained_parts <= VISION_PARTS,
        "the vision side alone trains, at the rate of --learning_rate", "pass that"),
    IdleFlags(("vision_cache_mib",), lambda options, launch: not options.use_lora and _trains_vision(options),
        "the vision side trains, so features change with every step", "add --freeze tower,merger", off=0),
    IdleFlags(("vision_cache_mib",), lambda options, launch: options.use_lora and _trains_vision(options),
        "adapters in the vision side train, so features change with every step", "train adapters in the language model "
        "alone", off=0),
    IdleFlags(("vision_cache_mib",), lambda options, launch: not options.shared_prefix, "TRL's own passes take no "
        "features", "drop --shared_prefix false", off=0),
    IdleFlags(("reward_timeout_s",), lambda options, launch: options.reward is None,
        "no reward function of your own is called", "add --reward FILE:FUNCTION"),
    IdleFlags(("reward_correct", "reward_valid_call"), lambda options, launch: options.reward is not None,
        "the function of --reward has its own values", "drop --reward"),
    IdleFlags(("warmup_steps",), lambda options, launch: options.lr_scheduler_type == "constant",
        "the schedule 'constant' does not warm up", "add --lr_scheduler_type constant_with_warmup", off=0),
    IdleFlags(("epsilon", "epsilon_high"), lambda options, launch: options.optimizer_steps_per_generation == 1,
        "each generation serves one optimizer step, whose ratio is 1",
        "pass --num_iterations 2 or more --steps_per_generation"),
    IdleFlags(VLLM, lambda options, launch: not options.use_vllm, "vLLM does not generate", "add --use_vllm true"),
    IdleFlags(("vllm_enable_sleep_mode",), lambda options, launch: not options.use_vllm, "vLLM does not generate",
        "add --use_vllm true", off=False),
    IdleFlags(("rollout_correction",), lambda options, launch: not options.use_vllm,
        "Fleet draws from the trainer's own probabilities, so each weight is 1", "add --use_vllm true", off="none"),
    IdleFlags(("rollout_correction_cap",), lambda options, launch: options.rollout_correction == "none",
        "rollouts have no weights", "drop --rollout_correction none"),
    IdleFlags(("vllm_server_host", "vllm_server_port"), lambda options, launch: options.vllm_mode != "server",
        "vLLM runs beside training", "add --vllm_mode server"),
    IdleFlags(COLOCATED, lambda options, launch: options.vllm_mode == "server", "the server was started with its own",
        "drop --vllm_mode server"),
    IdleFlags(("vllm_enable_sleep_mode",), lambda options, launch: options.vllm_mode == "server",
        "a server keeps its own memory", "drop --vllm_mode server", off=False),
    IdleFlags(("ds3_gather_for_generation",), lambda options, launch: not is_zero3(launch), *NOT_SHARDED, off=False),
    IdleFlags(("ds3_gather_for_generation",), lambda options, launch: options.use_vllm
        and not options.eval_steps and _has_no_look_curve(options, launch), "vLLM generates and nothing is evaluated",
        "drop --use_vllm", off=False),
    IdleFlags(("eval_episodes",), lambda options, launch: not options.eval_steps, "nothing is evaluated",
        "add --eval_steps 50"),
    IdleFlags(("eval_seed",), lambda options, launch: not options.eval_steps and _has_no_look_curve(options, launch),
        "nothing is evaluated", "add --eval_steps 50"),
    IdleFlags(("control_episodes",), _has_no_look_curve, *NO_LOOK_CURVE),
    IdleFlags(("stop_if_blind",), _has_no_look_curve, *NO_LOOK_CURVE, off="none"),
    IdleFlags(("stop_if_blind",), lambda options, launch: options.env is None
        and options.fixed_correct_index is not None, "the right index is always the same, so a policy need not look",
        "add --fixed_correct_index none", off="none"),
    IdleFlags(("keep_best",), lambda options, launch: not options.eval_steps, "nothing is evaluated",
        "add --eval_steps 50", off=False),
    IdleFlags(("assume_gpus", "assume_accelerate"), lambda options, launch: not options.dry_run,
        "a run has the machine that it has", "add --dry_run"),
    IdleFlags(("assume_accelerate",), lambda options, launch: options.assume_gpus is None,
        "this launch is planned for as it is", "add --assume_gpus 8x80"),
    IdleFlags(("json",), lambda options, launch: not options.dry_run, "only a dry run answers in one object",
        "add --dry_run", off=False),
    IdleFlags(("trust_checkpoint",), lambda options, launch: not options.resume, "no checkpoint is read",
        "add --resume", off=False),
)

IDLE_IN_EVALUATION = (
    IdleFlags(("revision",), lambda options, launch: not any(map(_is_from_hub, options.models)), *NOT_FROM_HUB),
    NO_ENV_ARGS,
    NO_COLUMNS,
    ONE_TURN,
    IdleFlags(("temperature", "top_p", "top_k", "min_p", "seed"), lambda options, launch: options.num_samples == 0,
        "no sample is drawn", "pass --num_samples 4"),
    IdleFlags(("allow_reasoning",), lambda options, launch: options.prompt_style is not None,
        "--prompt_style says what is asked, and reasoning is accepted with either", "drop --prompt_style", off=False),
    IdleFlags(("ds3_gather_for_generation",), lambda options, launch: not is_zero3(launch), *NOT_SHARDED, off=False),
)
# fmt: on


def refuse_idle(
    table: Sequence[IdleFlags], options: Any, given: Collection[str], launch_variables: Mapping[str, str]
) -> None:
    """Raises UsageError for the first flag in the table that was given and would do nothing."""
    for entry in table:
        for flag in entry.flags:
            value = getattr(options, flag)
            if flag in given and value != entry.off and entry.are_idle(options, launch_variables):
                raise UsageError(f"{flag}={as_flag_value(value)}, but {entry.reason}; {entry.remedy} or drop --{flag}")


def idle_flags(options: Any, launch_variables: Mapping[str, str] = os.environ) -> list[str]:
    """The flags that have no part in this training run, sorted."""
    idle = {
        flag
        for entry in IDLE_IN_TRAINING
        if entry.are_idle(options, launch_variables)
        for flag in entry.flags
        if getattr(options, flag) != entry.off
    }
    return sorted(idle)
