"""A checked training run becomes a model and a trainer.

`prepare` writes nothing; `build_trainer` takes the run's folder last.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import LoraConfig
from transformers.trainer_callback import ProgressCallback
from trl import RLOOConfig

from dataset import RepeatableEpisodeDataset
from fleet.command.command_line import COLOURED
from fleet.command.flags import TaskFlags
from fleet.command.idle_flags import idle_flags
from fleet.command.image_check import Findings, RunData, images_of
from fleet.command.options import Options, ResolvedDefault, own_code, resolve_options
from fleet.command.output_dir import paths_read
from fleet.command.preflight import own_reward
from fleet.command.resume_check import recorded_checkpointing, require_same_run
from fleet.command.training_flags import GenerationFlags, RLOOFlags, TrainedPartFlags
from fleet.errors import Preempted, RunEnded, RunStopped, UsageError, one_line
from fleet.evaluation.figures import EvaluationPlan
from fleet.evaluation.held_out import RunEpisodes
from fleet.model_folder.files import read_json
from fleet.model_folder.parts import LANGUAGE_MODEL, VISION_PARTS
from fleet.processes import first_problem, gather_by_rank, raise_first, require_same_flags, together
from fleet.qwen.vision_cache import vision_is_frozen
from fleet.rl.checkpoints import ProcessPlace
from fleet.rl.look_watch import LookWatch
from fleet.rl.trainer import FleetRLOOTrainer, num_episodes_of_run
from fleet.run import launch_checks, model_setup
from fleet.run.build.held_out_plans import plan_held_out
from fleet.run.build.prediction import NOTHING_PREDICTED, RunPrediction, predict_together
from fleet.run.build.settings import answer_settings, context_length, look_plan, make_rloo_config, trainer_settings
from fleet.run.commands import resume_command
from fleet.run.config import config_text
from fleet.run.data import agree_on_data, require_encodable_prompts, require_last_episode
from fleet.run.output import begin_folder, find_checkpoint, held, name_output_dir
from fleet.run.peers import connect
from fleet.run.preemption import Preemption
from fleet.run.recorder import RunRecorder
from fleet.run.records import parameters_table, resolved_table
from fleet.run.watchdog import Watchdog
from fleet.run_folder import CONFIG_NAME
from fleet.run_lock import RunLock
from model_utils import count_parameters, make_lora_config, read_adapter_config
from utils.plain_text import printable
from utils.split_folders import count_of

logger = logging.getLogger("fleet")


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed all checks that need no weight, the same on every process.

    options: resolved. args: TRL's. plan: of held-out evaluation, if any. look: of the look curve, if any.
    prediction: of memory, work and disk.
    """

    options: Options
    args: RLOOConfig
    data: RunData
    plan: EvaluationPlan | None
    look: EvaluationPlan | None = None
    prediction: RunPrediction = NOTHING_PREDICTED


def prepare(options: Options, findings: Findings | None, problem: str | None, watchdog: Watchdog) -> PreparedRun:
    """Resolves the options, starts the process group, and has all processes agree. Writes nothing.

    findings, problem: of the checks on this process. Raises UsageError on all processes if any has a problem.
    """
    model_setup.use_every_core()
    if options.assume_gpus is None:
        launch_checks.require_one_gpu_or_a_launcher()
    has_bf16_gpu = options.assume_gpus is not None or model_setup.has_bfloat16()
    options, filled = resolve_options(
        replace(options, gradient_checkpointing=recorded_checkpointing(options, options.gradient_checkpointing)),
        has_bf16_gpu=has_bf16_gpu,
    )
    launch_checks.require_launchers_dtype(options.dtype)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    flags = asdict(options)
    # also the files of an adapter decide which flags are idle, and they may be broken on one machine
    problem = first_problem(problem, lambda: require_same_run(options, flags, idle_flags(options), num_processes))
    # a default without a part in the run is not worth a line
    shown = [default for default in filled if default.flag not in idle_flags(options)]
    logger.info(describe_run(options.model_id, options, options, shown), extra=COLOURED)
    problem = first_problem(
        problem,
        lambda: model_setup.require_loadable_models(options.model_id, revision=options.revision),
        lambda: require_encodable_prompts(options, findings, options.model_id),
    )
    # from here on the processes hear of each other
    args = make_rloo_config(options)
    problem = first_problem(
        problem,
        lambda: launch_checks.require_launchers_deepspeed(args),
        lambda: launch_checks.require_assumed_launch(options),
    )
    raise_first(gather_by_rank(problem))
    require_same_flags(flags)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    watchdog.peers = connect(args.process_index, args.world_size, host)
    watchdog.start_with("the comparison of images and the plan of evaluation")
    data = agree_on_data(options, findings)
    paths = [image.path for image in images_of(data.env) or ()]
    model_setup.say_what_the_toy_has_not_seen(options.model_id, options, paths)
    num_episodes = num_episodes_of_run(args)
    if options.env is not None:
        require_last_episode(data.env, options.env, num_episodes, options.dynamic_sampling)
    runs = [RunEpisodes(data.env, num_episodes, options.dynamic_sampling)]
    by_default = [default.flag for default in filled]
    plan, look = together(lambda: plan_held_out(options, options, by_default, runs, data))
    args.gradient_checkpointing, prediction = predict_together(options, args, data.env)
    options = replace(options, gradient_checkpointing=args.gradient_checkpointing)
    return PreparedRun(options, args, data, plan, look, prediction)


def describe_run(model_id: str, task: TaskFlags, rloo: RLOOFlags, filled: Sequence[ResolvedDefault]) -> str:
    """The start of the log: the run in a line, and the defaults that were chosen for it."""
    right = "drawn and named" if task.fixed_correct_index is None else f"always {task.fixed_correct_index}"
    shown = f"{task.candidates_per_episode} images, right index {right}"
    if task.env is not None:
        shown = f"environment {printable(task.env)}"
    return (
        f"Fleet: RLOO on {printable(model_id)}, {count_of(int(rloo.train_steps or 0), 'step')} of "
        f"{rloo.per_device_batch_size} episodes x {rloo.num_rollouts} rollouts a device; {shown}\n\n"
        f"{resolved_table(filled)}"
    )


@contextlib.contextmanager
def built(run: PreparedRun, watchdog: Watchdog) -> Iterator[tuple[FleetRLOOTrainer, Path | None]]:
    """Within it, the run holds its folder. Gives the trainer with its model loaded, and the checkpoint to go on from.

    Raises UsageError on all processes if one refuses. A run that ends early says how to go on with it.
    """
    options, rank = run.options, run.args.process_index
    watchdog.start_with("the making of the toy model, or the reading of a checkpoint")
    model_path = model_setup.local_model_path(options.model_id, options)
    folder = name_output_dir(options.output_dir, options.model_id, rank)
    with held(folder, rank) as lock:
        trainer, checkpoint = build_trainer(run, folder, model_path, watchdog, lock)
        watchdog.start_with("the preparation of training")
        try:
            yield trainer, checkpoint
        except RunEnded as error:
            if error.can_resume:
                error.add_note(f"to go on: {resume_command(str(folder))}")
            raise


def build_trainer(
    run: PreparedRun, folder: Path, model_path: str, watchdog: Watchdog, lock: RunLock | None
) -> tuple[FleetRLOOTrainer, Path | None]:
    """(the trainer with its model loaded, the checkpoint to go on from); the run's folder has been begun.

    folder: of the run, whose lock the main process holds. model_path: what `from_pretrained` opens.
    """
    options, args = replace(run.options, output_dir=str(folder)), run.args
    args.output_dir = str(folder)
    place, code = ProcessPlace(args.process_index, args.world_size, gather_object), own_code(options)
    checkpoint = find_checkpoint(folder, options, run.data, place, code, options.model_id)
    config = run_config(replace(run, options=options), folder)
    # a resumed run has that evaluation already
    args.eval_on_start = bool(options.eval_steps) and checkpoint is None
    watchdog.start_with("the loading of the model")
    model, processor, lora, cache_mib = load_for_training(options, args, model_path)
    if options.use_vllm and options.vllm_mode == "colocate" and args.vllm_max_model_length is None:
        num_episodes = num_episodes_of_run(args)
        args.vllm_max_model_length = context_length(options, run.data.env, num_episodes, processor, model.config)
    with server_problems_said(options):
        trainer = FleetRLOOTrainer(
            model,
            args,
            RepeatableEpisodeDataset(run.data.env, options.image_max_pixels),
            processor,
            trainer_settings(options, cache_mib * 2**20),
            reward_function=own_reward(options),
            peft_config=lora,
            evaluation=None if run.plan is None else (run.plan, answer_settings(options)),
            run_config=config,
            trusts_checkpoint=options.trust_checkpoint,
            num_kept_checkpoints=options.save_total_limit,
            on_activity=watchdog.beat,
            displaced_by=(lambda: None) if lock is None else lock.displaced_by,
        )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RunRecorder(trainer, options, fixed_correct_index=options.fixed_correct_index))
    if run.look is not None:
        trainer.look_watch = LookWatch(trainer, look_plan(options, run.look, run.plan))
        trainer.add_callback(trainer.look_watch)
    rates = dict.fromkeys(VISION_PARTS, trainer.vision_learning_rate or args.learning_rate)
    table = parameters_table(count_parameters(trainer.model), rates | {LANGUAGE_MODEL: args.learning_rate})
    logger.info(table, extra=COLOURED)
    paths = paths_read(options.model_id, options.data_root, code)
    begin_folder(folder, options, paths, config, run.data.sha256s, args.process_index)
    return trainer, checkpoint


def load_for_training(
    flags: TrainedPartFlags, args: RLOOConfig, model_path: str
) -> tuple[Any, Any, LoraConfig | None, int]:
    """(model, processor, the adapter that TRL wraps it in, MiB for image features). Every process takes part.

    bfloat16 keeps 8 bits of a weight, so a step of 1e-6 would round away: weights that train are held in float32 and
    computed in bfloat16 by autocast, unless DeepSpeed keeps a float32 copy or only adapters train.
    """
    is_adapter = read_adapter_config(model_path) is not None
    can_be_half = args.deepspeed_plugin is not None or flags.use_lora
    model, processor = model_setup.load_model(
        flags,
        model_path,
        dtype=None if can_be_half else torch.float32,
        # TRL wraps the model in a new adapter itself; an adapter that exists is opened here
        trains_adapter=flags.use_lora and is_adapter,
        freeze=flags.frozen_parts,
    )
    lora = None
    if flags.use_lora and not is_adapter:
        lora = make_lora_config(flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_targets.split(","))
    cache_mib = int(flags.vision_cache_mib or 0)
    if cache_mib and lora is None and not vision_is_frozen(model):
        logger.info(f"the adapter {flags.model_id} trains the vision side, so no image features are kept\n")
        cache_mib = 0
    return model, processor, lora, cache_mib


def run_config(run: PreparedRun, folder: Path) -> str:
    """The text of the run's config.json. A resumed run keeps the id in its folder."""
    options = run.options
    recorded_id = read_json(folder / CONFIG_NAME).get("run_id") if options.resume else None
    return config_text(
        asdict(options),
        idle_flags(options),
        own_code(options),
        run.data,
        run_id=str(recorded_id or uuid.uuid4().hex),
        num_episodes=num_episodes_of_run(run.args),
        num_processes=run.args.world_size,
        prediction=run.prediction.figures(),
    )


@contextlib.contextmanager
def server_problems_said(flags: GenerationFlags) -> Iterator[None]:
    """Within it, a vLLM server that is missing or unfit for TRL raises UsageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # memory and files of this machine are no fault of the server
        is_ours = isinstance(error, torch.OutOfMemoryError) or getattr(error, "filename", None) is not None
        if is_ours or not flags.use_vllm or flags.vllm_mode != "server":
            raise
        raise UsageError(
            f"no vLLM server can be used at {flags.vllm_server_host}:{flags.vllm_server_port} "
            f"({one_line(error)}); start one as docs/many_gpus.md says, or pass --vllm_mode colocate"
        ) from error


def train(trainer: FleetRLOOTrainer, checkpoint: Path | None) -> None:
    """Trains from a checkpoint on, or from the start.

    Raises RunStopped after the save of a run that gains blindly, Preempted after that of one that is told to stop.
    """
    preemption = Preemption(trainer)
    trainer.add_callback(preemption)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.look_watch is not None and trainer.look_watch.stop_reason is not None:
        raise RunStopped(trainer.look_watch.stop_reason)
    if preemption.is_stopping:
        raise Preempted(
            f"told to stop: saved step {trainer.state.global_step} of {trainer.args.max_steps} in "
            f"{trainer.args.output_dir}"
        )
