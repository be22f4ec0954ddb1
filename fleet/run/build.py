"""A checked run becomes TRL's arguments, a model and a trainer.

Owns how Fleet's flags map to the libraries' arguments. All processes agree before anything is written, and the main
one writes.
"""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_callback import ProgressCallback
from trl import RLOOConfig

from dataset import RepeatableEpisodeDataset
from fleet.command.command_line import result_or_problem
from fleet.command.image_check import RunData
from fleet.command.options import Options, ResolvedDefault
from fleet.command.output_dir import empty_run_folder, make_new_output_dir, require_output_dir
from fleet.command.preflight import own_reward
from fleet.command.resume_check import images_of_beginning, require_same_images, why_of_another_run
from fleet.episodes import BrokenEpisode, EpisodeSource, checked_episode
from fleet.errors import Preempted, RunEnded, UsageError
from fleet.evaluation.answering import AnswerSettings
from fleet.evaluation.figures import EvaluationPlan
from fleet.evaluation.held_out import make_plan, num_episodes_drawn
from fleet.model_folder.files import read_json
from fleet.qwen.vision_cache import vision_is_frozen
from fleet.rl.checkpoints import ProcessPlace, choose_checkpoint, remedy_of, remove_unfinished
from fleet.rl.resumable_trainer import require_plain_pickles
from fleet.rl.settings import TrainerSettings
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.run.commands import resume_command
from fleet.run.config import config_text, what_changed_since
from fleet.run.launch_checks import require_launchers_deepspeed
from fleet.run.model_setup import has_gpu, load_model, require_agreement
from fleet.run.peers import connect
from fleet.run.preemption import Preemption
from fleet.run.recorder import RunRecorder
from fleet.run.records import resolved_table
from fleet.run.watchdog import Watchdog
from fleet.run_folder import CONFIG_NAME, IMAGES_NAME, write_atomically
from fleet.run_lock import RunLock
from model_utils import count_parameters, make_lora_config, read_adapter_config
from reward import RewardWeights
from utils.images import BadImage
from utils.plain_text import printable
from utils.split_folders import count_of

logger = logging.getLogger("fleet")


def describe_run(options: Options, filled: Sequence[ResolvedDefault]) -> str:
    """The start of the log: the run in a line, and the defaults that were chosen for it."""
    assert options.train_steps is not None, "resolved"
    right = "drawn and named" if options.fixed_correct_index is None else f"always {options.fixed_correct_index}"
    task = f"{options.candidates_per_episode} images, right index {right}"
    if options.env is not None:
        task = f"environment {printable(options.env)}"
    headline = (
        f"Fleet: RLOO on {printable(options.model_id)}, {count_of(options.train_steps, 'step')} of "
        f"{options.per_device_batch_size} episodes x {options.num_rollouts} rollouts a device; "
        f"{task}"
    )
    return f"{headline}\n\n{resolved_table(filled)}"


def start_distributed(options: Options, watchdog: Watchdog, problem: str | None = None) -> RLOOConfig:
    """TRL's arguments, whose making starts the process group.

    watchdog: hears from the other processes from then on. problem: what the checks found on this process. Raises
    UsageError on all processes if any has a problem, or if their flags differ.
    """
    args = make_rloo_config(options)
    require_agreement(options, problem or result_or_problem(lambda: require_launchers_deepspeed(args))[1])
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    watchdog.peers = connect(args.process_index, args.world_size, host, gather_object)
    return args


def name_output_dir(options: Options, args: RLOOConfig) -> Options:
    """The options with their output folder's name, the same on every process.

    Touches no folder, except for making a new one where none was named.
    """
    folder, problem = options.output_dir, None
    if folder is None and args.process_index == 0:
        folder, problem = result_or_problem(lambda: str(make_new_output_dir(options)))
    require_agreement(options, problem)
    agreed = [str(folder)]
    broadcast_object_list(agreed)
    args.output_dir = agreed[0]
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(agreed[0]) / "tensorboard")
    return replace(options, output_dir=agreed[0])


@contextlib.contextmanager
def held_output_dir(options: Options, args: RLOOConfig) -> Iterator[RunLock | None]:
    """Within it, no other run writes into the run's folder. The main process holds the lock; others get None.

    Raises UsageError on every process if another run holds it.
    """
    lock, problem = None, None
    if args.process_index == 0:
        lock = RunLock(Path(str(options.output_dir)))
        _, problem = result_or_problem(lock.take)
    try:
        require_agreement(options, problem)
        yield lock
    finally:
        if lock is not None:
            lock.release()


def find_checkpoint(options: Options, args: RLOOConfig, data: RunData) -> Path | None:
    """The checkpoint that the run goes on from, the same on every process; None for a run that begins.

    Raises UsageError if all that there are are damaged, the one to load could run code, or the images changed.
    """
    if not options.resume:
        return None
    recorded = read_json(Path(str(options.output_dir)) / CONFIG_NAME)
    require_same_images(recorded, data, images_of_beginning(options))
    if changed := what_changed_since(recorded, options):
        logger.warning(
            f"resume: since the run began, changed: {', '.join(changed)}; its bits may differ from here on\n"
        )
    place = ProcessPlace(args.process_index, args.world_size)
    folder = Path(str(options.output_dir))
    checkpoint = choose_checkpoint(folder, place, gather_object, partial(why_of_another_run, recorded))
    if checkpoint is None:
        logger.warning(f"resume: {folder} has no checkpoint yet, so the run begins at step 0\n")
    elif not options.trust_checkpoint:
        require_plain_pickles(checkpoint, place, gather_object)
    return checkpoint


def take_output_dir(options: Options, trainer: FleetRLOOTrainer, data: RunData, lock: RunLock | None) -> None:
    """Called after all checks pass: makes or empties the run's folder and writes config.json.

    lock: which the main process holds. Raises UsageError on all processes if somebody has put files there since the
    checks, or the folder cannot be written to.
    """
    folder = Path(str(options.output_dir))
    num_processes = trainer.args.world_size
    run_id = read_json(folder / CONFIG_NAME).get("run_id") if options.resume else None
    trainer.run_config = config_text(
        options, data, num_episodes_drawn(options, num_processes), num_processes, str(run_id or uuid.uuid4().hex)
    )
    problem = None
    if lock is not None:
        trainer.displaced_by = lock.displaced_by
        _, problem = result_or_problem(lambda: _begin_folder(folder, options, trainer.run_config, data))
    require_agreement(options, problem)


def _begin_folder(folder: Path, options: Options, run_config: str, data: RunData) -> None:
    # loading the model took its time, and what was not there then must not be deleted or mixed with now
    require_output_dir(options)
    try:
        if options.overwrite and folder.is_dir():
            empty_run_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        write_atomically(folder / CONFIG_NAME, run_config)
        if data.sha256s and not (folder / IMAGES_NAME).exists():
            write_atomically(folder / IMAGES_NAME, json.dumps(data.sha256s, indent=0) + "\n")
    except OSError as error:
        raise UsageError(
            f"output_dir={folder} cannot be written to ({error}); {remedy_of(error, folder)}, and start again"
        ) from error


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
        # the watchdog, which says why, comes first
        ddp_timeout=max(1800, int(options.step_timeout_s) + 120),
        logging_steps=options.logging_steps,
        report_to=options.report_to,
        dataloader_num_workers=options.dataloader_num_workers,
        bf16=options.dtype == "bfloat16",
        use_cpu=not has_gpu(),
        dataloader_pin_memory=has_gpu(),
        eval_strategy="steps" if options.eval_steps else "no",
        eval_steps=options.eval_steps or None,
        # Trainer's own evaluation loop, which is never run, wants whole groups
        per_device_eval_batch_size=options.num_rollouts,
        metric_for_best_model="greedy_accuracy" if options.keep_best else None,
        greater_is_better=True if options.keep_best else None,
        # read for the reference model alone, which a full fine-tune with beta > 0 loads again
        model_init_kwargs={"revision": options.revision} if options.revision and options.beta else None,
        # an episode's number is its randomness, so the order stays as it is
        shuffle_dataset=False,
    )


def build_trainer(
    options: Options, args: RLOOConfig, env: EpisodeSource, plan: EvaluationPlan | None, model_path: str
) -> FleetRLOOTrainer:
    """The trainer with its model loaded. plan: of held-out evaluation. Raises UsageError if there is no such model."""
    is_adapter = read_adapter_config(model_path) is not None
    model, processor = load_model(
        options,
        model_path,
        dtype=weight_dtype(options, is_deepspeed=args.deepspeed_plugin is not None),
        # TRL wraps the model in a new adapter itself; an adapter that exists is opened here
        trains_adapter=options.use_lora and is_adapter,
        freeze_vision=options.freeze_vision,
    )
    is_new_adapter = options.use_lora and not is_adapter
    lora = make_lora_config(options.lora_rank, options.lora_alpha, options.lora_dropout) if is_new_adapter else None
    cache_mib = int(options.vision_cache_mib or 0)
    if cache_mib and not (is_new_adapter or vision_is_frozen(model)):
        logger.info(f"the adapter {options.model_id} trains the vision side, so no image features are kept\n")
        cache_mib = 0
    with server_problems_said(options):
        trainer = FleetRLOOTrainer(
            model,
            args,
            RepeatableEpisodeDataset(env, options.image_max_pixels),
            processor,
            trainer_settings(options, cache_mib * 2**20),
            reward_function=own_reward(options),
            peft_config=lora,
            evaluation=None if plan is None else (plan, answer_settings(options)),
            trusts_checkpoint=options.trust_checkpoint,
            num_kept_checkpoints=options.save_total_limit,
        )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(
        RunRecorder(
            trainer,
            Path(args.output_dir),
            report_to=options.report_to,
            sample_steps=options.sample_steps,
            evaluates=bool(options.eval_steps),
            keep_best=options.keep_best,
            fixed_correct_index=options.fixed_correct_index,
        )
    )
    logger.info(describe_parameters(trainer.model))
    return trainer


def trainer_settings(options: Options, vision_cache_bytes: int) -> TrainerSettings:
    """The trainer's settings for these options."""
    return TrainerSettings(
        RewardWeights(options.reward_correct, options.reward_valid_call),
        allow_reasoning=options.allow_reasoning,
        skips_bad_images=options.bad_images == "skip",
        max_skipped_steps=options.max_skipped_steps,
        shared_prefix=options.shared_prefix,
        vision_cache_bytes=vision_cache_bytes,
        vllm_max_logprob_gap=options.vllm_max_logprob_gap,
    )


@contextlib.contextmanager
def server_problems_said(options: Options) -> Iterator[None]:
    """Within it, a vLLM server that is not there, or was started without what TRL needs, raises UsageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not (options.use_vllm and options.vllm_mode == "server"):
            raise
        # memory and files of this machine are no fault of the server's
        if isinstance(error, torch.OutOfMemoryError) or getattr(error, "filename", None) is not None:
            raise
        raise UsageError(
            f"no vLLM server can be used at {options.vllm_server_host}:{options.vllm_server_port} "
            f"({' '.join(str(error).split())}); start one as README.md says under vLLM, or pass --vllm_mode colocate"
        ) from error


def require_last_episode(options: Options, data: RunData) -> None:
    """Raises UsageError on every process if a user's environment has not as many episodes as the run draws."""
    if options.env is None:
        return
    num_episodes = num_episodes_drawn(options, int(os.environ.get("WORLD_SIZE", "1")))

    def draw_last() -> None:
        try:
            checked_episode(data.env, num_episodes - 1)
        except BrokenEpisode as error:
            raise UsageError(f"env={options.env}, of which the run draws {num_episodes} episodes: {error}") from error
        except (BadImage, OSError):
            # the episode is there, and its picture is a matter of --bad_images
            pass

    _, problem = result_or_problem(draw_last)
    require_agreement(options, problem)


def plan_evaluation(options: Options, data: RunData) -> EvaluationPlan | None:
    """What is measured while training, on episodes that the run itself does not draw; None if nothing is.

    Raises UsageError on every process if there is no such plan on any.
    """
    if not options.eval_steps:
        return None
    runs = [(data.env, num_episodes_drawn(options, int(os.environ.get("WORLD_SIZE", "1"))))]
    plan, problem = result_or_problem(
        lambda: make_plan(options, runs, skipped_images=data.skipped_images, drawn_images=data.sha256s)
    )
    require_agreement(options, problem)
    return plan


def answer_settings(options: Options) -> AnswerSettings:
    """How the held-out episodes are answered: as many completions at a time as training generates."""
    assert options.per_device_batch_size and options.steps_per_generation and options.max_completion_length
    return AnswerSettings(
        episodes_per_batch=options.per_device_batch_size * options.steps_per_generation * options.num_rollouts,
        max_completion_length=options.max_completion_length,
        max_pixels=options.image_max_pixels,
    )


@contextlib.contextmanager
def watched(options: Options) -> Iterator[Watchdog]:
    """Within it, a run that makes no progress for --step_timeout_s ends its process and says why."""
    watchdog = Watchdog(options.step_timeout_s, int(os.environ.get("RANK", "0")))
    watchdog.start_with("the start of all processes")
    try:
        yield watchdog
    except BaseException:
        # the others hear of it if they do not end for the same reason
        watchdog.stop(is_at_end=False)
        raise
    watchdog.stop()


@contextlib.contextmanager
def telling_how_to_go_on(options: Options) -> Iterator[None]:
    """Within it, a run that ends early has a note with the whole command that goes on with it."""
    try:
        yield
    except RunEnded as error:
        if error.can_resume:
            error.add_note(f"to go on: {resume_command(options)}")
        raise


def train(options: Options, trainer: FleetRLOOTrainer, checkpoint: Path | None) -> None:
    """Trains from a checkpoint on, or from the start. Raises Preempted once a run that was told to stop has saved."""
    # a resumed run has that evaluation already
    trainer.args.eval_on_start = bool(options.eval_steps) and checkpoint is None
    preemption = Preemption(trainer)
    trainer.add_callback(preemption)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if preemption.is_stopping:
        raise Preempted(
            f"told to stop: saved step {trainer.state.global_step} of {options.train_steps} in {options.output_dir}"
        )


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
