"""Every run that cannot be is refused in seconds, by name and with a remedy, before torch or a weight is loaded."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from environment import EpisodeSource, PickImageEnv
from fleet.command import output_dir, preflight, resume_check
from fleet.command.idle_flags import idle_flags
from fleet.command.options import Options, own_code, parse_options
from fleet.errors import UsageError
from tests.conftest import save_picture, save_png_of_zeros, save_truncated

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH_FREE = (
    "utils.tool_calls, utils.images, environment, reward, fleet.rl.rollouts, fleet.command.idle_flags, "
    "fleet.command.options, fleet.command.image_check, fleet.command.preflight"
)


def options_of(*arguments: object) -> Options:
    return parse_options([str(argument) for argument in arguments])


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content).encode()
    # weights begin with the length of their header, here of no weights
    path.write_bytes(len(text).to_bytes(8, "little") + text if path.suffix == ".safetensors" else text)


def refusal_of(check, *arguments) -> str:
    with pytest.raises(UsageError) as refusal:
        check(*arguments)
    return str(refusal.value)


def test_nothing_that_checks_a_run_imports_torch():
    program = f"import sys, {TORCH_FREE}; print(*{{'torch', 'transformers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- the whole check --------------------------------------------------------------------------------------------------


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda package: object())


def test_sound_run_gets_its_environment(everything_installed, picture_folder, tmp_path):
    options = options_of("--data_root", picture_folder, "--output_dir", tmp_path / "new", "--seed", 3)
    env = preflight.check_before_loading(options, launch_variables={}).env
    assert env.episode(5) == PickImageEnv(picture_folder, seed=3).episode(5)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "launch_variables", "words"),
    [
        (["--model_id", "nothing_here"], {}, "model_id=nothing_here is no folder"),
        (["--output_dir", "pictures"], {}, "output_dir=pictures is not empty"),
        (["--data_root", "nowhere"], {}, "data folder nowhere does not exist"),
        ([], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "3"}, "do not make 8 processes"),
    ],
)
def test_whole_check_makes_every_check(
    everything_installed, picture_folder, monkeypatch, arguments, launch_variables, words
):
    monkeypatch.chdir(picture_folder.parent)
    options = options_of("--data_root", picture_folder, *arguments)
    assert words in refusal_of(preflight.check_before_loading, options, launch_variables)


def test_whole_check_looks_for_packages(monkeypatch, picture_folder):
    monkeypatch.setattr(preflight, "find_spec", lambda package: None)
    options = options_of("--data_root", picture_folder)
    assert "package torchvision is not installed" in refusal_of(preflight.check_before_loading, options, {})


# --- packages ---------------------------------------------------------------------------------------------------------

NEEDED = {
    "torchvision": ([], "pip install torchvision"),
    "flash_attn": (["--attn_implementation", "flash_attention_2"], "or pass --attn_implementation sdpa"),
    "bitsandbytes": (["--use_lora", "--load_in_4bit"], "pip install bitsandbytes"),
    "vllm": (["--use_vllm"], "pip install 'vllm>=0.22,<0.32'"),
    "tensorboard": ([], "pip install tensorboard"),
    "wandb": (["--report_to", "wandb"], "pip install wandb"),
    "trackio": (["--report_to", "trackio"], "pip install trackio"),
}


@pytest.mark.parametrize(("package", "arguments", "remedy"), [(name, *row) for name, row in NEEDED.items()])
def test_missing_package_is_named_with_what_needs_it(monkeypatch, package, arguments, remedy):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == package else object())
    message = refusal_of(preflight.require_packages, options_of(*arguments))
    assert f"package {package} is not installed" in message
    assert remedy in message


def test_a_vllm_of_unknown_version_passes(everything_installed):
    preflight.require_packages(options_of("--use_vllm"))


def test_package_that_the_run_does_not_use_may_be_missing(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: object() if name == "torchvision" else None)
    preflight.require_packages(options_of("--report_to", "none"))


# --- launch variables -------------------------------------------------------------------------------------------------

LAUNCHES = {
    "no launcher": {},
    "rank without a world": {"RANK": "7"},
    "one process": {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    "eight on one machine": {"WORLD_SIZE": "8", "RANK": "7", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "7"},
    "second of two machines": {
        "WORLD_SIZE": "16",
        "RANK": "15",
        "LOCAL_WORLD_SIZE": "8",
        "LOCAL_RANK": "7",
        "GROUP_WORLD_SIZE": "2",
    },
    "world size alone": {"WORLD_SIZE": "4"},
    "other variables": {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "x", "CUDA_VISIBLE_DEVICES": "0,1"},
}

BAD_LAUNCHES = {
    "machines that differ": (
        {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"},
        "2 machines with 4 processes on this one do not make 16 processes; give every machine the same --num_machines",
    ),
    "total given for each machine": (
        {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"},
        "2 machines with 8 processes on this one do not make 8 processes",
    ),
    "no whole number of machines": ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "3"}, "do not make 8 processes"),
    "more here than in all": ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "do not make 2 processes"),
    "rank too high": ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "a rank is not below its world size"),
    "local rank too high": ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "a rank is not below"),
    "world of none": ({"WORLD_SIZE": "0"}, "a rank is not below its world size"),
    "machine of none": ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "do not make 2 processes"),
    "word": ({"WORLD_SIZE": "two"}, "each must be a whole number"),
    "empty": ({"WORLD_SIZE": ""}, "each must be a whole number"),
    "negative": ({"WORLD_SIZE": "2", "RANK": "-1"}, "each must be a whole number"),
}


@pytest.mark.parametrize("variables", LAUNCHES.values(), ids=LAUNCHES.keys())
def test_consistent_launch(variables):
    preflight.require_consistent_launch(variables)


@pytest.mark.parametrize(("variables", "words"), BAD_LAUNCHES.values(), ids=BAD_LAUNCHES.keys())
def test_inconsistent_launch_is_refused(variables, words):
    assert words in refusal_of(preflight.require_consistent_launch, variables)


# --- the model --------------------------------------------------------------------------------------------------------

MODEL_FILES = {
    "config.json": {"model_type": "qwen2_5_vl"},
    "model.safetensors": {},
    "preprocessor_config.json": {},
    "tokenizer.json": {},
}

# files of the folder, then words of the refusal or None
ADAPTER: dict[str, object] = {"adapter_model.safetensors": {}}

MODEL_FOLDERS = {
    "sound": (MODEL_FILES, None),
    "in shards": (
        {**MODEL_FILES, "model.safetensors": None, "model-00001-of-00002.safetensors": {}},
        None,
    ),
    "newer processor, older tokenizer": (
        {
            **MODEL_FILES,
            "preprocessor_config.json": None,
            "processor_config.json": {},
            "tokenizer.json": None,
            "vocab.json": {},
        },
        None,
    ),
    "empty": ({}, "has no config.json; pass a folder written by save_pretrained"),
    "no config": ({**MODEL_FILES, "config.json": None}, "has no config.json"),
    "older Qwen": ({**MODEL_FILES, "config.json": {"model_type": "qwen2_vl"}}, "holds a qwen2_vl, but Fleet trains"),
    "text model": ({**MODEL_FILES, "config.json": {"model_type": "llama"}}, "holds a llama, but Fleet trains"),
    "no model type": ({**MODEL_FILES, "config.json": {}}, "holds a None, but Fleet trains qwen2_5_vl"),
    "config a list": ({**MODEL_FILES, "config.json": []}, "config.json holds a list, wanted a JSON object"),
    "no weights": ({**MODEL_FILES, "model.safetensors": None}, r"has no weights (*.safetensors)"),
    "no processor": ({**MODEL_FILES, "preprocessor_config.json": None}, "has no processor (preprocessor_config.json"),
    "no tokenizer": ({**MODEL_FILES, "tokenizer.json": None}, "has no tokenizer (tokenizer.json"),
    "adapter on the toy": ({**ADAPTER, "adapter_config.json": {"base_model_name_or_path": "toy"}}, None),
    "adapter on a hub model": (
        {**ADAPTER, "adapter_config.json": {"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}},
        None,
    ),
    "adapter of pickled weights": (
        {"adapter_config.json": {"base_model_name_or_path": "toy"}, "adapter_model.bin": {}},
        "has no adapter_model.safetensors; save it with safe_serialization=True",
    ),
    "adapter on a folder that is gone": (
        {**ADAPTER, "adapter_config.json": {"base_model_name_or_path": "/gone/base"}},
        "is an adapter whose base_model_name_or_path=/gone/base is no folder",
    ),
}


@pytest.mark.parametrize(("files", "words"), MODEL_FOLDERS.values(), ids=MODEL_FOLDERS.keys())
def test_model_folder(tmp_path, files, words):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        if content is not None:
            write_json(folder / name, content)
    if words is None:
        preflight.require_model(str(folder))
    else:
        message = refusal_of(preflight.require_model, str(folder))
        assert words in message
        assert str(folder) in message or "adapter_config.json" in files


def test_model_folder_whose_config_is_cut_off(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type":', encoding="utf-8")
    assert f"{tmp_path / 'config.json'} cannot be read" in refusal_of(preflight.require_model, str(tmp_path))


def test_adapter_on_a_folder_of_another_model(tmp_path):
    write_json(tmp_path / "base" / "config.json", {"model_type": "llama"})
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": str(tmp_path / "base")})
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    assert "base holds a llama" in refusal_of(preflight.require_model, str(tmp_path / "adapter"))


@pytest.mark.parametrize("model_id", ["toy", "Qwen/Qwen2.5-VL-3B-Instruct", "my-org/my.model_v1"])
def test_toy_and_hub_ids_are_accepted_unseen(tmp_path, monkeypatch, model_id):
    monkeypatch.chdir(tmp_path)
    preflight.require_model(model_id)


@pytest.mark.parametrize(
    "model_id", ["qwen", "./model", "/no/such/model", "~/model", "../model", "a/b/c", "here/missing", "file.bin"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path, monkeypatch, model_id):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file.bin").touch()
    message = refusal_of(preflight.require_model, model_id)
    assert f"model_id={model_id} is no folder" in message
    assert "a hub id such as Qwen/Qwen2.5-VL-3B-Instruct, or toy" in message


# --- the output folder ------------------------------------------------------------------------------------------------


def leave_run(folder: Path, options: Options | None = None, *, with_checkpoint: bool = True) -> Path:
    """What a run of Fleet's leaves, as far as it matters for the next one."""
    write_json(folder / "config.json", {"options": dataclasses.asdict(options or options_of("--output_dir", folder))})
    if with_checkpoint:
        write_json(folder / "checkpoint-50" / "trainer_state.json", {})
    return folder


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_new_or_empty_output_folder_is_accepted(tmp_path, flags):
    output_dir.require_output_dir(options_of())
    output_dir.require_output_dir(options_of("--output_dir", tmp_path / "new", *flags))
    output_dir.require_output_dir(options_of("--output_dir", tmp_path, *flags))


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_file_for_an_output_folder_is_refused(tmp_path, flags):
    path = save_picture(tmp_path / "a.png")
    message = refusal_of(output_dir.require_output_dir, options_of("--output_dir", path, *flags))
    assert f"output_dir={path} is a file; pass a folder" in message


@pytest.mark.parametrize("name", ["a.png", ".hidden"])
def test_non_empty_output_folder_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    message = refusal_of(output_dir.require_output_dir, options_of("--output_dir", tmp_path))
    assert f"output_dir={tmp_path} is not empty; pass --resume to continue the run in it, --overwrite" in message


def test_overwrite_is_for_a_run_of_fleets_only(tmp_path):
    run = leave_run(tmp_path / "run")
    model = tmp_path / "model"
    write_json(model / "config.json", {"model_type": "qwen2_5_vl"})
    output_dir.require_output_dir(options_of("--output_dir", run, "--overwrite"))
    for folder in (model, tmp_path):
        message = refusal_of(output_dir.require_output_dir, options_of("--output_dir", folder, "--overwrite"))
        assert f"output_dir={folder} holds no Fleet run, so nothing in it is deleted" in message
    assert (model / "config.json").exists()


def test_nothing_is_deleted_by_checking(tmp_path):
    run = leave_run(tmp_path / "run")
    output_dir.require_output_dir(options_of("--output_dir", run, "--overwrite"))
    assert (run / "checkpoint-50" / "trainer_state.json").exists()


def test_run_with_a_checkpoint_is_resumed(tmp_path):
    output_dir.require_output_dir(options_of("--output_dir", leave_run(tmp_path / "run"), "--resume"))


def test_run_cut_off_before_its_first_checkpoint_may_begin_again(tmp_path):
    run = leave_run(tmp_path / "run", with_checkpoint=False)
    output_dir.require_output_dir(options_of("--output_dir", run, "--resume"))


def test_folder_without_a_run_is_not_resumed(tmp_path):
    message = refusal_of(output_dir.require_output_dir, options_of("--output_dir", tmp_path / "new", "--resume"))
    assert (
        f"resume: {tmp_path / 'new'} has no config.json of a run; pass the output_dir of one, or --resume auto"
        in message
    )


def test_resume_auto_goes_by_whether_there_is_a_run(tmp_path):
    def settled(folder):
        return resume_check.resumes(options_of("--output_dir", folder, "--resume", "auto"))

    assert settled(leave_run(tmp_path / "run", with_checkpoint=False)) is True
    assert settled(tmp_path / "new") is False
    # killed while it wrote its config.json
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json.unfinished").touch()
    assert settled(tmp_path / "begun") is False
    output_dir.require_output_dir(options_of("--output_dir", tmp_path / "begun"))


def test_run_whose_flags_are_unknown_is_not_resumed(tmp_path):
    write_json(tmp_path / "checkpoint-50" / "trainer_state.json", {})
    message = refusal_of(output_dir.require_output_dir, options_of("--output_dir", tmp_path, "--resume"))
    assert f"resume: {tmp_path} has no config.json of a run" in message


# --- the flags of a resumed run ---------------------------------------------------------------------------------------


def make(options: Options) -> EpisodeSource:
    return preflight.make_environment(options, options.seed)


def resume(options: Options, num_processes: int = 1) -> None:
    resume_check.require_same_run(options, dataclasses.asdict(options), idle_flags(options, {}), num_processes)


def paths(options: Options) -> dict[str, str]:
    return output_dir.paths_read(options.model_id, options.data_root, own_code(options))


# everything else decides what is learnt
MAY_CHANGE = {
    "train_steps",
    "bad_images",
    "reward_timeout_s",
    "max_skipped_steps",
    "output_dir",
    "overwrite",
    "resume",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "sample_steps",
    "eval_steps",
    "keep_best",
    "control_steps",
    "stop_if_blind",
    "report_to",
    "dataloader_num_workers",
    "dry_run",
    "assume_gpus",
    "assume_accelerate",
    "json",
    "merge_lora",
    "ds3_gather_for_generation",
    "vision_cache_mib",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_logprob_gap",
    "vllm_max_model_length",
    "vllm_enable_sleep_mode",
    "trust_checkpoint",
    "step_timeout_s",
}
# of a run with no flags but these
HAD_NO_PART = {
    "lora_targets",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "epsilon",
    "eval_episodes",
    "eval_seed",
    "vllm_mode",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_gpu_memory_utilization",
    "vllm_tensor_parallel_size",
    "rollout_correction",
    "rollout_correction_cap",
}


def test_same_flags_may_resume(tmp_path):
    options = options_of("--output_dir", leave_run(tmp_path), "--resume")
    resume(options)


def test_only_what_does_not_change_the_run_may_change(tmp_path):
    options = options_of("--output_dir", tmp_path, "--resume")
    allowed = set()
    for name, value in dataclasses.asdict(options).items():
        write_json(tmp_path / "config.json", {"options": {**dataclasses.asdict(options), name: "another"}})
        try:
            resume(options)
            allowed.add(name)
        except UsageError as refusal:
            assert f"had other flags: {name} (was another, now {value}); pass the same ones" in str(refusal)
    assert allowed == MAY_CHANGE | HAD_NO_PART


def test_every_changed_flag_is_listed(tmp_path):
    leave_run(tmp_path, options_of("--output_dir", tmp_path, "--seed", 1, "--beta", 0.1, "--save_steps", 5))
    now = options_of("--output_dir", tmp_path, "--resume", "--num_rollouts", 8, "--train_steps", 99)
    assert refusal_of(resume, now) == (
        f"resume: the run in {tmp_path} had other flags: beta (was 0.1, now None), num_rollouts (was 4, now 8), "
        "seed (was 1, now 0); pass the same ones, or start a new run"
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_over_all_steps_cannot_be_made_longer(tmp_path, schedule):
    flags = ["--output_dir", tmp_path, "--lr_scheduler_type", schedule]
    leave_run(tmp_path, options_of(*flags, "--train_steps", 10))
    resume(options_of(*flags, "--train_steps", 10, "--resume"))
    message = refusal_of(resume, options_of(*flags, "--train_steps", 20, "--resume"))
    assert f"train_steps was 10 and is now 20, but the schedule {schedule} is drawn over all steps" in message


def test_another_number_of_processes_is_refused(tmp_path):
    options = options_of("--output_dir", tmp_path, "--resume")
    write_json(tmp_path / "config.json", {"options": dataclasses.asdict(options), "num_processes": 8})
    resume(options, 8)
    message = refusal_of(resume, options, 4)
    assert f"the run in {tmp_path} had 8 processes, and now there are 4" in message


def test_flags_of_a_run_that_is_not_resumed_are_its_own(tmp_path):
    leave_run(tmp_path, options_of("--output_dir", tmp_path, "--seed", 1))
    resume(options_of("--output_dir", tmp_path, "--overwrite"))


# --- the data and the environment -------------------------------------------------------------------------------------


ENV_FILE = """
from pathlib import Path
from environment import Episode

class MyEnv:
    def __init__(self, **arguments):
        self.arguments = arguments
    def episode(self, index):
        return Episode((Path("a.png"), Path("b.png")), (), 0, ("a", "b"), None, 0)
    def prompt_messages(self, episode):
        return [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]

class OneImageShort(MyEnv):
    def prompt_messages(self, episode):
        return [{"role": "user", "content": [{"type": "image"}]}]

class Failing(MyEnv):
    def episode(self, index):
        return 1 / 0

class ChoosyEnv(MyEnv):
    def __init__(self, **arguments):
        raise ValueError("ChoosyEnv wants another folder")
"""


@pytest.fixture
def workplace(picture_folder, tmp_path, monkeypatch) -> Path:
    """The current folder, with pictures/, empty/ and my_env.py of its own."""
    shutil.copytree(picture_folder, tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    (tmp_path / "my_env.py").write_text(ENV_FILE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD_PICTURES = {
    "cut off": (save_truncated, "cannot be decoded"),
    "text": (lambda path: path.write_text("no picture"), "is not in a format that is read"),
    "bomb": (lambda path: save_png_of_zeros(path, 20_000, 20_000, 1), "more than the 89,478,485 pixels allowed"),
    "narrow": (lambda path: save_picture(path, size=(400, 2)), "is 400x2 pixels, narrower than 1:200"),
}


@pytest.mark.parametrize(("make", "words"), BAD_PICTURES.values(), ids=BAD_PICTURES.keys())
def test_bad_picture_is_named(everything_installed, workplace, make, words):
    path = workplace / "pictures" / "white_moon.png"
    make(path)
    message = refusal_of(preflight.check_before_loading, options_of("--data_root", path.parent), {})
    assert re.search(f"1 of 7 images in {path.parent} cannot be used: white_moon.png .*{words}", message)


BAD_TASKS = {
    "missing folder": ({"data_root": "nowhere"}, "data folder nowhere does not exist; pass --data_root"),
    "file for a folder": ({"data_root": "pictures/red_circle.png"}, "red_circle.png is a file; pass --data_root"),
    "empty folder": ({"data_root": "empty"}, "data folder empty has 0 images, but candidates_per_episode=4"),
    "too few images": ({"candidates_per_episode": 7}, "has 6 images, but candidates_per_episode=7"),
    "one candidate": ({"candidates_per_episode": 1}, "candidates_per_episode=1"),
    "index past the candidates": ({"fixed_correct_index": 4}, "fixed_correct_index=4, but with candidates_per_episode"),
    "environment without a class": ({"env": "my_env.py"}, "env='my_env.py', but wanted path/to/file.py:ClassName"),
    "environment without a file": ({"env": "gone.py:MyEnv"}, "gone.py is not a file"),
    "environment of another name": (
        {"env": "my_env.py:Other"},
        "has no class Other that extends environment.Environment, or has methods episode",
    ),
    "environment that refuses": ({"env": "my_env.py:ChoosyEnv"}, "ChoosyEnv wants another folder"),
}


@pytest.mark.parametrize(("flags", "words"), BAD_TASKS.values(), ids=BAD_TASKS.keys())
def test_bad_task_is_refused(workplace, flags, words):
    arguments = [f"--{flag}={value}" for flag, value in {"data_root": "pictures", **flags}.items()]
    assert words in refusal_of(make, options_of(*arguments))


def test_too_few_labels_for_a_drawn_target(tmp_path):
    for number in range(4):
        save_picture(tmp_path / f"red_circle_{number}.png")
    make(options_of("--data_root", tmp_path))
    message = refusal_of(make, options_of("--data_root", tmp_path, "--fixed_correct_index", "none"))
    assert "has 1 different labels (['red circle'])" in message


def test_task_flags_reach_the_environment(workplace):
    line = "--data_root pictures --candidates_per_episode 3 --fixed_correct_index none --seed 5 --allow_reasoning"
    env = make(options_of(*line.split()))
    assert isinstance(env, PickImageEnv)
    wanted = PickImageEnv("pictures", 3, None, 5, allow_reasoning=True)
    assert env.episode(7) == wanted.episode(7)
    own = make(options_of(*line.split(), "--env", "my_env.py:MyEnv"))
    assert vars(own)["arguments"] == {
        "data_root": "pictures",
        "candidates_per_episode": 3,
        "fixed_correct_index": None,
        "seed": 5,
        "allow_reasoning": True,
    }


# --- what has gone wrong once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "", "itself"])
def test_adapter_that_names_no_base_or_itself_is_refused(tmp_path, base):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(adapter) if base == "itself" else base})
    assert "as its base; write the base model's folder" in refusal_of(preflight.require_model, str(adapter))


@pytest.mark.parametrize("name", ["model_id", "data_root"])
def test_overwrite_never_deletes_what_the_run_reads(tmp_path, name):
    run = leave_run(tmp_path / "run")
    used = run / "final"
    used.mkdir()
    options = options_of("--output_dir", run, "--overwrite", f"--{name}", used)
    assert "would be deleted before it is read" in refusal_of(output_dir.require_output_dir, options, paths(options))


def test_env_with_a_dataclass_and_late_annotations_loads(workplace):
    (workplace / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom environment import PickImageEnv\n"
        "@dataclass\nclass Note:\n    text: str\nclass Mine(PickImageEnv):\n    note = Note('x')\n"
    )
    options = options_of("--env", f"{workplace / 'mine.py'}:Mine", "--data_root", workplace / "pictures")
    assert type(make(options)).__name__ == "Mine"


def test_env_of_its_own_pictures_needs_no_data_folder(workplace):
    options = options_of("--env", "my_env.py:MyEnv", "--data_root", "nowhere")
    assert type(make(options)).__name__ == "MyEnv"


@pytest.mark.parametrize(
    ("env_class", "words"),
    [("OneImageShort", "2 images and 1 image placeholders"), ("Failing", "episode 0 failed with ZeroDivisionError")],
)
def test_env_whose_first_episode_is_unsound_is_refused(workplace, env_class, words):
    assert words in refusal_of(make, options_of("--env", f"my_env.py:{env_class}"))


def test_env_file_that_does_not_run_is_refused(workplace):
    (workplace / "broken.py").write_text("def episode(:\n")
    words = refusal_of(make, options_of("--env", "broken.py:Mine"))
    assert "failed with SyntaxError" in words


def test_adapter_without_use_lora_is_refused(everything_installed, picture_folder, tmp_path):
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"})
    write_json(tmp_path / "adapter" / "adapter_model.safetensors", {})
    options = options_of("--model_id", tmp_path / "adapter", "--data_root", picture_folder)
    assert "add --use_lora true" in refusal_of(preflight.check_before_loading, options, {})
    preflight.check_before_loading(dataclasses.replace(options, use_lora=True), {})


def test_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert "is not a folder to write to" in refusal_of(
        output_dir.require_output_dir, options_of("--output_dir", tmp_path / "file" / "run")
    )


def test_overwrite_spares_an_adapters_base_and_the_environment_file(tmp_path):
    run, adapter = leave_run(tmp_path / "run"), tmp_path / "adapter"
    (run / "final").mkdir()
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(run / "final")})
    (run / "env.py").touch()
    for flags in (["--model_id", adapter], ["--env", f"{run / 'env.py'}:Mine"]):
        options = options_of("--output_dir", run, "--overwrite", *flags)
        assert "would be deleted before it is read" in refusal_of(
            output_dir.require_output_dir, options, paths(options)
        )
