"""A checked run becomes TRL's arguments, a model and a trainer; a trained model becomes files.

Owns how Fleet's flags map to the libraries' arguments. All processes agree before anything is written, and the main
one writes.
"""

import datetime
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.integrations import unset_hf_deepspeed_config
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging as transformers_logging
from trl import RLOOConfig

from dataset import RepeatableEpisodeDataset
from environment import EpisodeSource
from flags import TOY_MODEL_ID, UsageError
from model_utils import count_parameters, load_processor, load_qwen25_vl, make_lora_config, read_adapter_config
from options import Options, ResolvedDefault
from reward import RewardWeights
from rloo_trainer import FleetRLOOTrainer
from run_records import (
    CURVE_NAME,
    METRICS_NAME,
    RunRecorder,
    draw_curve,
    read_metrics,
    resolved_table,
    write_config,
)
from toy_model import build_in_own_process
from vision_cache import vision_is_frozen

logger = logging.getLogger("fleet")


def has_gpu() -> bool:
    """Whether a GPU will train: there is one, and the launcher was not told to use the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def has_bfloat16() -> bool:
    """Whether to compute in bfloat16: a GPU does so natively, or the launcher was told to."""
    asked_by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return asked_by_launcher or (has_gpu() and torch.cuda.is_bf16_supported(including_emulation=False))


def require_one_gpu_or_a_launcher() -> None:
    """Raises UsageError for several GPUs and one process: only a launcher starts one process a GPU."""
    if has_gpu() and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs are visible to one process; start with accelerate launch training.py, "
            "or set CUDA_VISIBLE_DEVICES=0"
        )


def require_launchers_dtype(options: Options) -> None:
    """Raises UsageError if the launcher's mixed precision contradicts --dtype."""
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and options.dtype != "bfloat16":
        raise UsageError(
            f"dtype={options.dtype}, but accelerate was told mixed_precision: bf16; pass --dtype bfloat16, or "
            "mixed_precision 'no' to accelerate launch"
        )


def describe_run(options: Options, filled: Sequence[ResolvedDefault]) -> str:
    """The start of the log: the run in a line, and the defaults that were chosen for it."""
    right = "drawn and named" if options.fixed_correct_index is None else f"always {options.fixed_correct_index}"
    headline = (
        f"Fleet: RLOO on {options.model_id}, {options.train_steps} steps of {options.per_device_batch_size} episodes "
        f"x {options.num_rollouts} rollouts a device; {options.candidates_per_episode} images, right index {right}"
    )
    return f"{headline}\n\n{resolved_table(filled)}"


def start_distributed(options: Options, problem: str | None = None) -> tuple[Options, RLOOConfig]:
    """The options with their output folder's name, and TRL's arguments; the same on every process.

    problem: what the checks found on this process. Raises UsageError on all processes if any has a problem, or if
    their flags differ. Touches no folder, except for making a new one where none was named.
    """
    args = make_rloo_config(options)
    require_agreement(options, problem)
    agreed = [str(options.output_dir or make_new_output_dir(options))] if args.process_index == 0 else [""]
    broadcast_object_list(agreed)
    args.output_dir = agreed[0]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(agreed[0]) / "tensorboard")
    return replace(options, output_dir=agreed[0]), args


def make_new_output_dir(options: Options) -> Path:
    """A new folder of this run alone, also if another run starts in the same second."""
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{Path(options.model_id).name}"
    number = 1
    while True:
        folder = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        logger.info(f"--output_dir {folder}: a new folder each time\n")
        return folder


def take_output_dir(options: Options, args: RLOOConfig) -> None:
    """Makes or empties the run's folder and writes config.json, once everything that can fail before has not."""
    if args.process_index == 0:
        folder = Path(str(options.output_dir))
        if options.overwrite and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, options)
    args.distributed_state.wait_for_everyone()


def require_agreement(options: Options, problem: str | None) -> None:
    """Raises UsageError on every process if the checks of any failed, or any was started with other flags."""
    of_ranks = gather_object([(problem, asdict(options))])
    for rank, (found, _) in enumerate(of_ranks):
        if found is not None:
            raise UsageError(f"process {rank}: {found}" if len(of_ranks) > 1 else found)
    first = of_ranks[0][1]
    differing = [
        f"{name}={sorted({str(flags[name]) for _, flags in of_ranks})}"
        for name in sorted(first)
        if any(flags[name] != first[name] for _, flags in of_ranks)
    ]
    if differing:
        raise UsageError(f"processes were started with different flags: {', '.join(differing)}; give all the same")


def make_rloo_config(options: Options) -> RLOOConfig:
    """TRL's arguments for these resolved options. Constructing them starts the process group and DeepSpeed.

    Fleet counts episodes where TRL counts rollouts: a device's batch is per_device_batch_size x num_rollouts.
    """
    assert options.per_device_batch_size is not None
    return RLOOConfig(
        output_dir=options.output_dir or "runs",
        max_steps=options.train_steps,
        num_generations=options.num_rollouts,
        per_device_train_batch_size=options.per_device_batch_size * options.num_rollouts,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        steps_per_generation=options.steps_per_generation,
        num_iterations=options.num_iterations,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        beta=options.beta,
        epsilon=options.epsilon,
        epsilon_high=options.epsilon_high,
        normalize_advantages=options.normalize_advantages,
        mask_truncated_completions=options.mask_truncated_completions,
        gradient_checkpointing=options.gradient_checkpointing,
        temperature=options.temperature,
        top_p=options.top_p,
        max_completion_length=options.max_completion_length,
        ds3_gather_for_generation=options.ds3_gather_for_generation,
        use_vllm=options.use_vllm,
        vllm_mode=options.vllm_mode,
        vllm_server_host=options.vllm_server_host,
        vllm_server_port=options.vllm_server_port,
        vllm_gpu_memory_utilization=options.vllm_gpu_memory_utilization,
        vllm_tensor_parallel_size=options.vllm_tensor_parallel_size,
        seed=options.seed,
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        logging_steps=options.logging_steps,
        report_to=options.report_to,
        dataloader_num_workers=options.dataloader_num_workers,
        bf16=options.dtype == "bfloat16",
        use_cpu=not has_gpu(),
        dataloader_pin_memory=has_gpu(),
        # read for the reference model alone, which a full fine-tune with beta > 0 loads again
        model_init_kwargs={"revision": options.revision} if options.revision and options.beta else None,
        # an episode's number is its randomness, so the order stays as it is
        shuffle_dataset=False,
    )


def local_model_path(options: Options) -> str:
    """What `from_pretrained` is to open; builds the toy model if need be.

    Raises UsageError if the toy model's cache cannot be written.
    """
    if options.model_id != TOY_MODEL_ID:
        return options.model_id
    try:
        return str(build_in_own_process())
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"the toy model cannot be kept ({error}); set FLEET_CACHE to a folder to write to") from error


def build_trainer(options: Options, args: RLOOConfig, env: EpisodeSource, model_path: str) -> FleetRLOOTrainer:
    """The trainer with its model loaded. Raises UsageError if the model cannot be found or opened."""
    transformers_logging.disable_progress_bar()
    is_adapter = read_adapter_config(model_path) is not None
    try:
        model, processor = load_qwen25_vl(
            model_path,
            # TRL wraps the model in a new adapter itself; an adapter that exists is opened here
            use_lora=options.use_lora and is_adapter,
            freeze_vision=options.freeze_vision,
            load_in_4bit=options.load_in_4bit,
            dtype=weight_dtype(options, is_deepspeed=args.deepspeed_plugin is not None),
            attn_implementation=options.attn_implementation,
            revision=options.revision,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"model {options.model_id} cannot be loaded ({reason}); correct --model_id") from error
    is_new_adapter = options.use_lora and not is_adapter
    lora = make_lora_config(options.lora_rank, options.lora_alpha, options.lora_dropout) if is_new_adapter else None
    cache_mib = int(options.vision_cache_mib or 0)
    if cache_mib and not (is_new_adapter or vision_is_frozen(model)):
        logger.info(f"the adapter {options.model_id} trains the vision side, so no image features are kept\n")
        cache_mib = 0
    trainer = FleetRLOOTrainer(
        model,
        args,
        RepeatableEpisodeDataset(env, options.image_max_pixels),
        processor,
        reward_weights=RewardWeights(options.reward_correct, options.reward_valid_call),
        allow_reasoning=options.allow_reasoning,
        peft_config=lora,
        shared_prefix=options.shared_prefix,
        vision_cache_bytes=cache_mib * 2**20,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RunRecorder(trainer, Path(str(options.output_dir)), options.sample_steps))
    logger.info(describe_parameters(trainer.model))
    return trainer


def weight_dtype(options: Options, *, is_deepspeed: bool) -> torch.dtype:
    """What the weights are held in.

    bfloat16 keeps 8 bits of a weight, so a step of 1e-6 would round away: weights that train are held in float32 and
    computed in bfloat16 by autocast, unless DeepSpeed keeps a float32 copy or only adapters train.
    """
    can_be_half = options.dtype == "bfloat16" and (is_deepspeed or options.use_lora)
    return torch.bfloat16 if can_be_half else torch.float32


def describe_parameters(model: torch.nn.Module) -> str:
    """Trainable and all parameters by part, in a line."""
    parts = [f"{part} {trainable:,} of {total:,}" for part, (trainable, total) in count_parameters(model).items()]
    return f"trainable parameters: {'; '.join(parts)}\n"


def save_results(options: Options, trainer: FleetRLOOTrainer) -> None:
    """Writes final/, final_merged/ if asked for, and curve.png. Every process takes part."""
    folder = Path(str(options.output_dir))
    trainer.save_model(str(folder / "final"))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        draw_curve(read_metrics(folder / METRICS_NAME), folder / CURVE_NAME, f"RLOO on {options.model_id}")
        if options.merge_lora:
            merge_adapter(folder / "final", folder / "final_merged", revision=options.revision)
    trainer.accelerator.wait_for_everyone()


def merge_adapter(adapter_path: Path, merged_path: Path, *, revision: str | None = None) -> None:
    """Writes the adapter's base model with the adapter added to its weights, and the processor, to `merged_path`."""
    adapter = read_adapter_config(str(adapter_path))
    if adapter is None:
        raise FileNotFoundError(f"{adapter_path} holds no adapter_config.json; pass a folder that LoRA training wrote")
    # one process merges whole weights, so ZeRO-3 must not shard them as they load
    unset_hf_deepspeed_config()
    base_id = str(adapter.base_model_name_or_path)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(base_id, revision=revision, dtype="auto")
    PeftModel.from_pretrained(base, str(adapter_path)).merge_and_unload().save_pretrained(merged_path)
    load_processor(base_id, revision=revision).save_pretrained(merged_path)


def describe_results(options: Options, trainer: FleetRLOOTrainer) -> str:
    """The end of the log: what was learnt, how long it took, and where everything is."""
    lines = [line for line in trainer.state.log_history if "reward" in line]
    window = max(1, min(3, len(lines) // 2))
    means = {
        name: [sum(line[name] for line in part) / len(part) for part in (lines[:window], lines[-window:])]
        for name in ("reward", "accuracy")
    }
    figures = ", ".join(f"mean {name} {first:.2f} -> {last:.2f}" for name, (first, last) in means.items())
    seconds = sum(line.get("step_time_s", 0) for line in trainer.state.log_history)
    return (
        f"\n{figures} (first and last {window} logged steps), {seconds:.0f} s of training\n"
        f"in {options.output_dir}: metrics.jsonl, curve.png, config.json, checkpoints, final/"
    )
