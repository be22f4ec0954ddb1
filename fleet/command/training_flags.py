"""Every flag that training alone has, and its whole parser; the flags it shares with evaluation are in flags.py."""

import argparse
from collections.abc import Callable
from typing import Any

from fleet.command.flags import (
    add_held_out_flags,
    add_model_flags,
    add_sampling_flags,
    add_switch,
    add_task_flags,
    make_parser,
    true_false_or_auto,
    true_or_false,
    user_path,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser, flags in readable groups. Every value has a unit and a default in its help."""
    parser = make_parser(
        "training.py",
        "Train a Qwen2.5-VL model by RLOO (REINFORCE leave-one-out) to pick an image by one tool call. A flag that "
        "would do nothing beside the others is refused.",
    )
    add_model_flags(parser.add_argument_group("model").add_argument)
    _add_adapter_flags(parser.add_argument_group("what trains").add_argument)
    add_task_flags(parser.add_argument_group("task").add_argument)
    _add_rloo_flags(parser.add_argument_group("RLOO (names as in TRL's RLOOConfig)").add_argument)
    generation = parser.add_argument_group("generation").add_argument
    add_sampling_flags(generation)
    _add_generation_flags(generation)
    _add_evaluation_flags(parser.add_argument_group("held-out evaluation").add_argument)
    _add_run_flags(parser.add_argument_group("run").add_argument)
    return parser


def _add_adapter_flags(add: Callable[..., Any]) -> None:
    add_switch(add, "--use_lora", False, "train LoRA adapters on the language model, not all weights")
    add("--lora_rank", type=int, default=16, metavar="N", help="rank of new adapters (default: 16)")
    add("--lora_alpha", type=int, default=32, metavar="N", help="scale of new adapters (default: 32, twice the rank)")
    add(
        "--lora_dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="dropout in new adapters, 0 to 1 (default: 0, as old and new log-probabilities must agree)",
    )
    add_switch(add, "--merge_lora", False, "also write the base model with the adapters merged in, as final_merged/")
    add_switch(add, "--freeze_vision", False, "keep the vision tower and its merger as they are, as --use_lora does")
    add(
        "--vision_cache_mib",
        type=int,
        metavar="N",
        help="host memory per process for features of images, each of which is then encoded once while it is held, in "
        "MiB; 0 keeps none (default: 2048 where vision is frozen, as with LoRA; else 0, as features change)",
    )


def _add_rloo_flags(add: Callable[..., Any]) -> None:
    add(
        "--reward",
        type=user_path,
        metavar="FILE:FUNCTION",
        help="a reward function of your own, as path/to/file.py:function; accuracy stays what the environment judges "
        "(default: Fleet's own, by reward_correct and reward_valid_call)",
    )
    add(
        "--reward_timeout_s",
        type=float,
        default=60.0,
        metavar="X",
        help="time that one call of the reward function may take before the run stops, in seconds (default: 60, far "
        "above a rule's, enough for a model or a server that judges)",
    )
    add(
        "--reward_correct",
        type=float,
        default=0.95,
        metavar="X",
        help="Fleet's own reward for the right index (default: 0.95)",
    )
    add(
        "--reward_valid_call",
        type=float,
        default=0.05,
        metavar="X",
        help="Fleet's own reward for any well-formed call in range (default: 0.05, so that a right answer is worth 1)",
    )
    add(
        "--train_steps",
        type=int,
        metavar="N",
        help="optimizer steps in all (default: 60 for the toy, 100 where it must look, else 200)",
    )
    add("--num_rollouts", type=int, default=4, metavar="G", help="rollouts per episode, at least 2 (default: 4)")
    add(
        "--per_device_batch_size",
        type=int,
        metavar="N",
        help="episodes per device and micro-batch, each with its G rollouts (default: 8 for the toy, 16 where it "
        "must look, else 1)",
    )
    add(
        "--gradient_accumulation_steps",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches per optimizer step (default: 1)",
    )
    add(
        "--steps_per_generation",
        type=int,
        metavar="N",
        help="micro-batches per generation (default: gradient_accumulation_steps, which is on-policy)",
    )
    add(
        "--num_iterations",
        type=int,
        default=1,
        metavar="N",
        help="times each generation is trained on (default: 1, on-policy)",
    )
    add(
        "--learning_rate",
        type=float,
        metavar="X",
        help="AdamW's (default: 1e-4 for the toy, 2e-4 where it must look, 5e-4 with LoRA; else 1e-6, 1e-5 with LoRA)",
    )
    add(
        "--lr_scheduler_type",
        default="constant",
        metavar="NAME",
        choices=["constant", "constant_with_warmup", "linear", "cosine"],
        help="learning-rate schedule: constant, constant_with_warmup, linear or cosine (default: constant, so that a "
        "longer run begins like a shorter one)",
    )
    add(
        "--warmup_steps",
        type=int,
        default=0,
        metavar="N",
        help="optimizer steps of linear warm-up (default: 0; needs a schedule that warms up)",
    )
    add("--weight_decay", type=float, default=0.0, metavar="X", help="AdamW's (default: 0)")
    add("--max_grad_norm", type=float, default=1.0, metavar="X", help="gradients are clipped to this norm (default: 1)")
    add(
        "--beta",
        type=float,
        metavar="X",
        help="weight of the KL to the reference model (default: 0, no reference model in memory)",
    )
    add(
        "--epsilon",
        type=float,
        default=0.2,
        metavar="X",
        help="clip range of the ratio; off-policy only (default: 0.2)",
    )
    add("--epsilon_high", type=float, metavar="X", help="upper clip range; off-policy only (default: epsilon)")
    add(
        "--max_skipped_steps",
        type=int,
        default=5,
        metavar="N",
        help="optimizer steps in a row that were skipped, for a loss or gradient that is not finite, or in which no "
        "group had two rollouts that count, after which the run saves a checkpoint and stops (default: 5, as one odd "
        "batch passes and a broken model or reward does not)",
    )
    add_switch(add, "--normalize_advantages", False, "scale advantages to unit deviation over the batch")
    add_switch(add, "--mask_truncated_completions", False, "train on no completion that hit the length limit")
    add(
        "--gradient_checkpointing",
        type=true_or_false,
        nargs="?",
        const=True,
        metavar="true|false",
        help="recompute activations to save memory (default: false for the toy, else true)",
    )


def _add_generation_flags(add: Callable[..., Any]) -> None:
    add_switch(
        add,
        "--shared_prefix",
        True,
        "compute each prompt once per group in generation and training, as long as that is less work; false "
        "takes TRL's own passes",
    )
    add_switch(add, "--use_vllm", False, "generate with vLLM, which must be installed")
    add(
        "--vllm_mode",
        default="colocate",
        choices=["colocate", "server"],
        help="vLLM beside training on the same GPUs, or a server (default: colocate)",
    )
    add("--vllm_server_host", default="127.0.0.1", metavar="HOST", help="of the vLLM server (default: 127.0.0.1)")
    add("--vllm_server_port", type=int, default=8000, metavar="PORT", help="of the vLLM server (default: 8000)")
    add(
        "--vllm_gpu_memory_utilization",
        type=float,
        default=0.3,
        metavar="P",
        help="share of the GPU that colocated vLLM takes, 0 to 1 (default: 0.3)",
    )
    add("--vllm_tensor_parallel_size", type=int, default=1, metavar="N", help="GPUs per colocated vLLM (default: 1)")
    add(
        "--vllm_max_logprob_gap",
        type=float,
        default=0.1,
        metavar="X",
        help="how far the log-probabilities of vLLM and of the trainer may be apart, on average over the tokens of the "
        "first generation, in nats, before the run stops (default: 0.1; 16-bit rounding gives 0.01, other prompts 0.3)",
    )


def _add_evaluation_flags(add: Callable[..., Any]) -> None:
    add(
        "--eval_steps",
        type=int,
        default=0,
        metavar="N",
        help="optimizer steps between evaluations, the first before training, the last at its end; 0 for none "
        "(default: 0)",
    )
    add_held_out_flags(add, 256, 10**9)
    add_switch(add, "--keep_best", False, "also keep the checkpoint with the best held-out accuracy; needs eval_steps")


def _add_run_flags(add: Callable[..., Any]) -> None:
    add(
        "--output_dir",
        type=user_path,
        metavar="DIR",
        help="what the run leaves (default: a new runs/<date-time>-<model>)",
    )
    add_switch(add, "--overwrite", False, "empty a non-empty --output_dir first")
    add(
        "--resume",
        type=true_false_or_auto,
        nargs="?",
        const=True,
        default=False,
        metavar="true|false|auto",
        help="continue the run in output_dir from its last whole checkpoint, or from its start if it has none yet; "
        "auto: if there is a run, else begin one, for jobs that are restarted (default: false)",
    )
    add_switch(
        add,
        "--trust_checkpoint",
        False,
        "on resume, unpickle whatever the checkpoint's files hold, code included",
    )
    add("--seed", type=int, default=0, metavar="N", help="of episodes, adapters and sampling (default: 0)")
    add("--save_steps", type=int, default=50, metavar="N", help="optimizer steps between checkpoints (default: 50)")
    add(
        "--save_total_limit",
        type=int,
        default=2,
        metavar="N",
        help="checkpoints kept (default: 2, the last good one and its successor)",
    )
    add(
        "--logging_steps",
        type=int,
        default=1,
        metavar="N",
        help="optimizer steps per line of metrics; the last step always has one (default: 1)",
    )
    add(
        "--sample_steps",
        type=int,
        default=20,
        metavar="N",
        help="optimizer steps between tables of completions, printed and, with their pictures, sent to --report_to; 0 "
        "for none (default: 20)",
    )
    add(
        "--report_to",
        default="tensorboard",
        choices=["tensorboard", "wandb", "trackio", "none"],
        help="where metrics go besides metrics.jsonl (default: tensorboard, which sends nothing)",
    )
    add(
        "--dataloader_num_workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that open images ahead (default: 0, in the main one)",
    )
    add(
        "--step_timeout_s",
        type=float,
        default=1800.0,
        metavar="S",
        help="seconds without progress (a generation, a call of rewards, a pass, a save) after which the run ends with "
        "the reason instead of hanging (default: 1800, beyond the slowest of these)",
    )
    add_switch(add, "--dry_run", False, "check everything, print the resolved run, and stop before any weight loads")
