"""accelerate, its file and its DeepSpeed settings must agree with the flags, before a weight loads."""

import os

import torch
from trl import RLOOConfig

from fleet.command.training_flags import RunFlags
from fleet.errors import UsageError
from fleet.planning.machine import assumed_machine, launch_of_file
from fleet.run.model_setup import has_gpu


def require_one_gpu_or_a_launcher() -> None:
    """Raises UsageError for several GPUs and one process: only a launcher starts one process a GPU."""
    if has_gpu() and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; start with accelerate launch training.py, "
            "or set CUDA_VISIBLE_DEVICES=0"
        )


def require_launchers_dtype(dtype: str | None) -> None:
    """Raises UsageError if the launcher's mixed precision contradicts --dtype."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise UsageError(
            f"accelerate was told mixed_precision: {asked}, but Fleet computes in bf16 or float32; set bf16 or 'no'"
        )
    if asked == "bf16" and dtype != "bfloat16":
        raise UsageError(
            f"dtype={dtype}, but accelerate was told mixed_precision: bf16; pass --dtype bfloat16, or "
            "mixed_precision 'no' to accelerate launch"
        )


def require_assumed_launch(run: RunFlags) -> None:
    """Raises UsageError if the accelerate file of a dry run is not one."""
    if run.assume_accelerate and run.assume_gpus:
        launch_of_file(run.assume_accelerate, assumed_machine(run.assume_gpus)[0])


def require_launchers_deepspeed(args: RLOOConfig) -> None:
    """Raises UsageError if the accelerate file's DeepSpeed settings contradict the flags. "auto" follows the flags."""
    if args.deepspeed_plugin is None:
        return
    config = args.deepspeed_plugin.deepspeed_config
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UsageError(
                f"the accelerate file's DeepSpeed settings have their own {section}, but Fleet's flags set it; remove "
                f"{section} from that file"
            )
    if config.get("fp16", {}).get("enabled") is True:
        raise UsageError("the accelerate file's DeepSpeed settings enable fp16, but Fleet computes in bf16 or float32")
    rollouts = "per_device_batch_size x num_rollouts"
    batch_size = args.per_device_train_batch_size
    total = batch_size * args.gradient_accumulation_steps * args.world_size
    for name, flag, wanted in (
        ("gradient_accumulation_steps", "gradient_accumulation_steps", args.gradient_accumulation_steps),
        ("gradient_clipping", "max_grad_norm", args.max_grad_norm),
        ("train_micro_batch_size_per_gpu", rollouts, batch_size),
        ("train_batch_size", f"{rollouts} x gradient_accumulation_steps x processes", total),
    ):
        found = config.get(name, "auto")
        if found not in ("auto", wanted):
            raise UsageError(
                f"the accelerate file's DeepSpeed settings have {name}={found}, but the flags give {flag}={wanted}; "
                f"remove {name} from that file, or make them equal"
            )
