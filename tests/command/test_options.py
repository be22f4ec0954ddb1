"""The command line: every flag changes something, nothing is swallowed, and what cannot be is refused with a remedy."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fleet.ask import build_ask_parser
from fleet.command.evaluate_options import build_evaluate_parser
from fleet.command.options import MAY_CHANGE_ON_RESUME, Options, build_parser, parse_options, resolve_options
from fleet.errors import UsageError
from fleet.model_folder.parts import LORA_TARGETS, lora_pattern

pytestmark = pytest.mark.fast

DEFAULTS = parse_options([])
ACTIONS = {action.dest: action for action in build_parser()._actions}
FIELDS = [field.name for field in dataclasses.fields(Options)]

# flag: what it is by default, what is given, what it is then, and what it needs beside it
FLAGS = {
    "model_id": ("toy", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", []),
    "revision": (None, "v1", "v1", ["--model_id", "Qwen/Qwen2.5-VL-3B-Instruct"]),
    "dtype": (None, "float32", "float32", []),
    "attn_implementation": ("sdpa", "eager", "eager", []),
    "use_lora": (False, "true", True, []),
    "lora_rank": (16, "8", 8, ["--use_lora"]),
    "lora_alpha": (32, "64", 64, ["--use_lora"]),
    "lora_dropout": (0.0, "0.1", 0.1, ["--use_lora"]),
    "merge_lora": (False, "true", True, ["--use_lora"]),
    "load_in_4bit": (False, "true", True, ["--use_lora"]),
    "lora_targets": ("language", "merger,vision", "vision,merger", ["--use_lora"]),
    "freeze": (None, "merger,tower", "tower,merger", []),
    "vision_cache_mib": (None, "64", 64, ["--freeze", "tower,merger"]),
    "data_root": ("./toy_images", "my images", "my images", []),
    "image_column": (None, "photo", "photo", ["--data_root", "hub:owner/name"]),
    "label_column": (None, "kind", "kind", ["--data_root", "hub:owner/name"]),
    "split": (None, "test", "test", ["--data_root", "hub:owner/name"]),
    "bad_images": ("stop", "skip", "skip", []),
    "env": (None, "my_env.py:MyEnv", "my_env.py:MyEnv", []),
    "env_args": (None, '{"side":3}', '{"side": 3}', ["--env", "my_env.py:MyEnv"]),
    "candidates_per_episode": (4, "3", 3, []),
    "fixed_correct_index": (0, "none", None, []),
    "allow_reasoning": (False, "true", True, []),
    "max_turns": (1, "3", 3, []),
    "max_context_length": (None, "4096", 4096, ["--max_turns", "2"]),
    "image_max_pixels": (None, "100352", 100_352, []),
    "reward": (None, "my_reward.py:score", "my_reward.py:score", []),
    "reward_timeout_s": (60.0, "5.5", 5.5, ["--reward", "my_reward.py:score"]),
    "reward_correct": (0.95, "1", 1.0, []),
    "reward_valid_call": (0.05, "0", 0.0, []),
    "train_steps": (None, "8", 8, []),
    "num_rollouts": (4, "8", 8, []),
    "dynamic_sampling": (0, "3", 3, []),
    "per_device_batch_size": (None, "2", 2, []),
    "gradient_accumulation_steps": (1, "2", 2, []),
    "steps_per_generation": (None, "4", 4, []),
    "num_iterations": (1, "2", 2, []),
    "learning_rate": (None, "3e-5", 0.00003, []),
    "vision_learning_rate": (None, "3e-6", 0.000003, []),
    "lr_scheduler_type": ("constant", "cosine", "cosine", []),
    "warmup_steps": (0, "5", 5, ["--lr_scheduler_type", "linear"]),
    "weight_decay": (0.0, "0.01", 0.01, []),
    "max_grad_norm": (1.0, "0.5", 0.5, []),
    "max_skipped_steps": (5, "1", 1, []),
    "beta": (None, "0.04", 0.04, []),
    "epsilon": (0.2, "0.1", 0.1, ["--num_iterations", "2"]),
    "epsilon_high": (None, "0.28", 0.28, ["--num_iterations", "2"]),
    "normalize_advantages": (False, "true", True, []),
    "mask_truncated_completions": (False, "true", True, []),
    "gradient_checkpointing": (None, "true", True, []),
    "temperature": (1.0, "0.7", 0.7, []),
    "top_p": (1.0, "0.9", 0.9, []),
    "top_k": (0, "40", 40, []),
    "min_p": (0.0, "0.05", 0.05, []),
    "repetition_penalty": (1.0, "1.1", 1.1, []),
    "min_completion_length": (0, "12", 12, []),
    "max_completion_length": (None, "48", 48, []),
    "shared_prefix": (True, "false", False, []),
    "ds3_gather_for_generation": (False, "true", True, []),
    "use_vllm": (False, "true", True, []),
    "vllm_mode": ("colocate", "server", "server", ["--use_vllm"]),
    "vllm_server_host": ("127.0.0.1", "10.0.0.2", "10.0.0.2", ["--use_vllm", "--vllm_mode", "server"]),
    "vllm_server_port": (8000, "8001", 8001, ["--use_vllm", "--vllm_mode", "server"]),
    "vllm_gpu_memory_utilization": (0.3, "0.5", 0.5, ["--use_vllm"]),
    "vllm_tensor_parallel_size": (1, "2", 2, ["--use_vllm"]),
    "vllm_max_model_length": (None, "2048", 2048, ["--use_vllm"]),
    "vllm_enable_sleep_mode": (False, "true", True, ["--use_vllm"]),
    "rollout_correction": ("truncate", "none", "none", ["--use_vllm"]),
    "rollout_correction_cap": (2.0, "3.5", 3.5, ["--use_vllm"]),
    "vllm_max_logprob_gap": (0.1, "0.5", 0.5, ["--use_vllm"]),
    "eval_steps": (0, "20", 20, []),
    "eval_episodes": (256, "64", 64, ["--eval_steps", "20"]),
    "eval_seed": (1_000_000_000, "7", 7, ["--eval_steps", "20"]),
    "control_steps": (None, "10", 10, []),
    "control_episodes": (None, "16", 16, ["--control_steps", "10"]),
    "stop_if_blind": ("warn", "stop", "stop", ["--control_steps", "10", "--fixed_correct_index", "none"]),
    "keep_best": (False, "true", True, ["--eval_steps", "25"]),
    "output_dir": (None, "runs/one", "runs/one", []),
    "overwrite": (False, "true", True, ["--output_dir", "runs/one"]),
    "resume": (False, "true", True, ["--output_dir", "runs/one"]),
    "trust_checkpoint": (False, "true", True, ["--output_dir", "runs/one", "--resume"]),
    "seed": (0, "42", 42, []),
    "save_steps": (50, "10", 10, []),
    "save_total_limit": (2, "5", 5, []),
    "logging_steps": (1, "10", 10, []),
    "sample_steps": (20, "0", 0, []),
    "report_to": ("tensorboard", "none", "none", []),
    "dataloader_num_workers": (None, "2", 2, []),
    "step_timeout_s": (1800.0, "90", 90.0, []),
    "dry_run": (False, "true", True, []),
    "assume_gpus": (None, "8x80:H100", "8x80:H100", ["--dry_run"]),
    "assume_accelerate": (None, "eight.yaml", "eight.yaml", ["--dry_run", "--assume_gpus", "8x80"]),
    "json": (False, "true", True, ["--dry_run"]),
}
# ds3_gather_for_generation does nothing without ZeRO-3
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
SWITCHES = [flag for flag, (_, _, value, _) in FLAGS.items() if type(value) is bool]


def parse(line: str) -> Options:
    return parse_all(line.split())


def parse_all(arguments: Sequence[str]) -> Options:
    return parse_options(arguments, ZERO3)


def changed(before: Options, after: Options) -> dict[str, object]:
    return {name: getattr(after, name) for name in FIELDS if getattr(after, name) != getattr(before, name)}


# --- every flag -------------------------------------------------------------------------------------------------------


def test_table_covers_every_option_and_every_flag():
    assert FLAGS.keys() == set(FIELDS)
    assert ACTIONS.keys() == {*FLAGS, "help", "config"}


@pytest.mark.parametrize(("flag", "default", "given", "value", "also"), [(flag, *row) for flag, row in FLAGS.items()])
def test_flag_changes_its_option_and_no_other(flag, default, given, value, also):
    before = parse_all(also)
    for arguments in ([f"--{flag}", given], [f"--{flag}={given}"]):
        after = parse_all([*also, *arguments])
        assert changed(before, after) == {flag: value}
        assert type(getattr(after, flag)) is type(value)
    assert getattr(before, flag) == default


@pytest.mark.parametrize("flag", FLAGS)
def test_help_states_the_default_that_holds(flag):
    assert ACTIONS[flag].option_strings == [f"--{flag}"]
    stated = re.search(r"\(default: (\S*[^\s,;)])", str(ACTIONS[flag].help))
    assert stated, ACTIONS[flag].help
    have_no_value = {
        "revision", "env", "env_args", "reward", "output_dir", "steps_per_generation", "epsilon_high",
        "max_context_length", "image_column", "label_column", "split", "vision_learning_rate", "control_steps",
        "control_episodes", "vllm_max_model_length", "assume_gpus", "assume_accelerate",
    }  # fmt: skip
    if flag not in have_no_value:
        also = FLAGS[flag][3]
        given, by_default = parse_all([*also, f"--{flag}", stated[1]]), parse_all(also)
        assert resolve_options(given, has_bf16_gpu=True)[0] == resolve_options(by_default, has_bf16_gpu=True)[0]


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert [flag for flag in (*FLAGS, "config") if f"--{flag} " not in printed] == []


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("build", [build_parser, build_evaluate_parser, build_ask_parser])
def test_help_fits_the_terminal(build, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = build().format_help().splitlines()
    assert max(len(line) for line in lines) <= min(columns, 110)


def test_a_value_of_thousands_of_characters_is_refused_in_a_short_line():
    for digits, words in ((4000, "seed=9999999999"), (5000, "99999999999999999999... has 5,000 characters")):
        with pytest.raises(UsageError) as refusal:
            parse_all(["--seed", "9" * digits])
        assert words in str(refusal.value) and len(str(refusal.value)) < 200


def test_what_a_resumed_run_may_change_are_flags():
    assert set(FLAGS) >= MAY_CHANGE_ON_RESUME


@pytest.mark.parametrize("flag", SWITCHES)
def test_switch_alone_is_true_and_may_be_spelt_out(flag):
    also = " ".join(FLAGS[flag][3])
    for spelling, value in [("", True), (" True", True), ("=true", True), (" false", False)]:
        assert getattr(parse(f"{also} --{flag}{spelling}"), flag) is value
    assert parse(f"{also} --{flag} --num_rollouts 8").num_rollouts == 8
    with pytest.raises(UsageError, match=f"--{flag}: got 'yes', wanted true"):
        parse(f"--{flag} yes")


def test_there_are_as_many_switches_as_booleans():
    assert len(SWITCHES) == sum("bool" in str(field.type) for field in dataclasses.fields(Options)) == 17


def test_resume_may_be_left_to_what_is_found():
    assert parse("--output_dir runs/one --resume auto").resume == "auto"
    assert parse("--output_dir runs/one --resume").resume is True
    with pytest.raises(UsageError, match="--resume: got 'maybe', wanted true, false or auto"):
        parse("--output_dir runs/one --resume maybe")


@pytest.mark.parametrize(("given", "index"), [("none", None), ("None", None), ("0", 0), ("3", 3), ("12", 12)])
def test_fixed_correct_index(given, index):
    assert parse(f"--fixed_correct_index {given}").fixed_correct_index == index


# --- refusals ---------------------------------------------------------------------------------------------------------

MISSPELT = {
    "--num_rollout 8": "unknown flag --num_rollout, did you mean --num_rollouts?",
    "--learning-rate 1e-5": "unknown flag --learning-rate, did you mean --learning_rate?",
    "--lr=1e-5": "unknown flag --lr",
    "--use_lor": "unknown flag --use_lor, did you mean --use_lora?",
    "--confg run.yaml": "unknown flag --confg, did you mean --config?",
    "--num_roll 8": "unknown flag --num_roll",  # no abbreviations: a later flag could make them mean another
    "toy": "unknown flag toy",
    "--dry_run --xyzzy": "unknown flag --xyzzy; see --help",
    "--freeze_vision": "unknown flag --freeze_vision: pass --freeze tower,merger; see --help",
    "--freeze_vision=true": "unknown flag --freeze_vision: pass --freeze tower,merger; see --help",
}

WRONG_TYPE = {
    "--num_rollouts four": "--num_rollouts: invalid int value: 'four'",
    "--num_rollouts 4.0": "--num_rollouts: invalid int value: '4.0'",
    "--num_rollouts": "--num_rollouts: expected one argument",
    "--learning_rate high": "--learning_rate: invalid float value: 'high'",
    "--dtype float16": "--dtype: invalid choice: 'float16'",
    "--attn_implementation flash": "--attn_implementation: invalid choice",
    "--lr_scheduler_type step": "--lr_scheduler_type: invalid choice",
    "--vllm_mode local": "--vllm_mode: invalid choice",
    "--rollout_correction mask": "--rollout_correction: invalid choice: 'mask'",
    "--report_to mlflow": "--report_to: invalid choice",
    "--fixed_correct_index -1": "--fixed_correct_index: got '-1', wanted an index from 0 up, or none",
    "--fixed_correct_index 1.0": "--fixed_correct_index: got '1.0'",
    "--fixed_correct_index ２": "--fixed_correct_index: got '２'",
    "--freeze vision": "--freeze: got 'vision', wanted some of tower,merger,language_model, or none; see --help",
    "--freeze tower,": "--freeze: got 'tower,', wanted some of",
    "--freeze=": "--freeze: got '', wanted some of",
    "--lora_targets tower": "--lora_targets: got 'tower', wanted some of language,vision,merger; see --help",
    "--lora_targets none": "--lora_targets: got 'none', wanted some of",
    "--gradient_checkpointing 1": "--gradient_checkpointing: got '1', wanted true, false or auto",
}

IMPOSSIBLE = {
    "--num_rollouts 1": "num_rollouts=1, but leave-one-out needs at least 2 rollouts per episode; pass --num_rollouts",
    "--num_rollouts 0": "num_rollouts=0",
    "--num_rollouts -4": "num_rollouts=-4",
    "--train_steps 0": "train_steps=0, but it must be at least 1",
    "--per_device_batch_size 0": "per_device_batch_size=0, but it must be at least 1",
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps=0, but it must be at least 1",
    "--steps_per_generation 0": "steps_per_generation=0, but it must be at least 1",
    "--num_iterations 0": "num_iterations=0, but it must be at least 1",
    "--lora_rank 0": "lora_rank=0, but it must be at least 1",
    "--use_lora --lora_rank 8193": "lora_rank=8193, but it must be at most 8,192; correct --lora_rank",
    "--lora_alpha 0": "lora_alpha=0, but it must be at least 1",
    "--max_completion_length 0": "max_completion_length=0, but it must be at least 1",
    "--save_steps 0": "save_steps=0, but it must be at least 1",
    "--save_total_limit 0": "save_total_limit=0, but it must be at least 1",
    "--logging_steps 0": "logging_steps=0, but it must be at least 1",
    "--vllm_tensor_parallel_size 0": "vllm_tensor_parallel_size=0, but it must be at least 1",
    "--vllm_max_model_length 0": "vllm_max_model_length=0, but it must be at least 1",
    "--rollout_correction_cap 0.5": "rollout_correction_cap=0.5, but it must be at least 1",
    "--vllm_max_logprob_gap 0": "vllm_max_logprob_gap=0.0, but it must be above 0",
    "--learning_rate 0": "learning_rate=0.0, but it must be above 0",
    "--learning_rate -0.5": "learning_rate=-0.5, but it must be above 0",
    "--learning_rate nan": "learning_rate=nan, but it must be above 0",
    "--learning_rate inf": "learning_rate=inf, but it must be above 0",
    "--max_skipped_steps 0": "max_skipped_steps=0, but it must be at least 1",
    "--reward_timeout_s 0": "reward_timeout_s=0.0, but it must be above 0",
    "--reward_timeout_s inf": "reward_timeout_s=inf, but it must be above 0",
    "--reward my.py:f --reward_timeout_s 60 --step_timeout_s 60": "reward_timeout_s=60 is not below step_timeout_s=60",
    "--temperature 0": "temperature=0.0, but it must be above 0",
    "--max_grad_norm 0": "max_grad_norm=0.0, but it must be above 0",
    "--reward_correct 0": "reward_correct=0.0, but it must be above 0",
    "--reward_correct inf": "reward_correct=inf, but it must be above 0",
    "--epsilon 0": "epsilon=0.0, but it must be above 0",
    "--epsilon_high 0": "epsilon_high=0.0, but it must be above 0",
    "--warmup_steps -1": "warmup_steps=-1, but it must be at least 0",
    "--weight_decay -0.1": "weight_decay=-0.1, but it must be at least 0",
    "--beta -0.1": "beta=-0.1, but it must be at least 0",
    "--beta nan": "beta=nan, but it must be at least 0",
    "--reward_valid_call -0.1": "reward_valid_call=-0.1, but it must be at least 0",
    "--sample_steps -1": "sample_steps=-1, but it must be at least 0",
    "--dataloader_num_workers -1": "dataloader_num_workers=-1, but it must be at least 0",
    "--seed -1": "seed=-1, but it must be at least 0",
    "--lora_dropout -0.1": "lora_dropout=-0.1, but it must be at least 0",
    "--lora_dropout 1": "lora_dropout=1.0, but it must be below 1",
    "--image_max_pixels 783": "image_max_pixels=783, but it must be at least 784",
    "--top_k -1": "top_k=-1, but it must be at least 0",
    "--min_p 1": "min_p=1.0, but it must be below 1",
    "--repetition_penalty 0": "repetition_penalty=0.0, but it must be above 0",
    "--min_completion_length 32 --max_completion_length 32": "min_completion_length=32 is not below "
    "max_completion_length=32, so no completion could end",
    "--top_p 0": "top_p=0.0, but it must be above 0 and at most 1",
    "--top_p 1.1": "top_p=1.1, but it must be above 0 and at most 1",
    "--vllm_gpu_memory_utilization 0": "vllm_gpu_memory_utilization=0.0, but it must be above 0",
    "--vllm_gpu_memory_utilization 2": "vllm_gpu_memory_utilization=2.0, but it must be above 0",
    "--gradient_accumulation_steps 2 --steps_per_generation 3": "steps_per_generation=3 is not a multiple of "
    "gradient_accumulation_steps=2",
    "--gradient_accumulation_steps 2 --steps_per_generation 1": "steps_per_generation=1 is not a multiple",
    "--use_vllm --top_k 5": "use_vllm=true with top_k: vLLM's log-probabilities are compared with the trainer's",
    "--use_vllm --min_completion_length 5": "use_vllm=true with min_completion_length",
    "--max_turns 0": "max_turns=0, but it must be at least 1",
    "--max_turns 2 --use_vllm": "max_turns=2, but tools answer in Fleet's own sampling alone",
    "--max_turns 2 --shared_prefix false": "drop --use_vllm and --shared_prefix false",
    "--max_turns 2 --attn_implementation flash_attention_2": "flash_attention_2 takes no mask that keeps branches",
    "--vision_cache_mib -1": "vision_cache_mib=-1, but it must be at least 0",
    "--freeze merger,language_model,tower": "freeze=tower,merger,language_model leaves nothing to train; name fewer "
    "parts, or pass --use_lora true in its place",
    "--vision_learning_rate 0": "vision_learning_rate=0.0, but it must be above 0",
    "--load_in_4bit": "load_in_4bit=true, .* add --use_lora true",
    "--resume --overwrite --output_dir runs/one": "resume and overwrite are both given",
    "--resume": "resume is given without output_dir; pass --output_dir",
}

BARELY_POSSIBLE = [
    "--num_rollouts 2",
    "--train_steps 1 --per_device_batch_size 1 --save_steps 1 --logging_steps 1 --save_total_limit 1",
    "--top_p 1 --use_vllm --vllm_gpu_memory_utilization 1 --use_lora --lora_dropout 0.99",
    "--warmup_steps 0 --beta 0 --weight_decay 0 --sample_steps 0 --seed 0 --reward_valid_call 0",
    "--image_max_pixels 784",
    "--rollout_correction none --vllm_enable_sleep_mode false",
    "--use_vllm --rollout_correction_cap 1",
    "--gradient_accumulation_steps 2 --steps_per_generation 6",
    "--warmup_steps 5 --lr_scheduler_type constant_with_warmup",
    "--load_in_4bit --use_lora --merge_lora",
    "--vision_cache_mib 64 --use_lora",
    "--vision_cache_mib 0",
    "--freeze tower,tower --vision_learning_rate 1e-9",
    "--freeze none --use_lora --lora_targets language,vision,merger --vision_learning_rate 1",
    "--overwrite --output_dir runs/one",
    "--step_timeout_s 30",  # below the time limit of a reward function that is not there
    "--use_lora --lora_rank 8192",
]


@pytest.mark.parametrize(("line", "words"), (MISSPELT | WRONG_TYPE).items(), ids=(MISSPELT | WRONG_TYPE).keys())
def test_unknown_or_ill_typed_is_refused(line, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse(line)


@pytest.mark.parametrize(("line", "words"), IMPOSSIBLE.items(), ids=IMPOSSIBLE.keys())
def test_impossible_is_refused_with_a_remedy(line, words):
    with pytest.raises(UsageError, match=words):
        parse(line)


@pytest.mark.parametrize("line", BARELY_POSSIBLE)
def test_the_edge_of_the_possible_is_accepted(line):
    assert changed(DEFAULTS, parse(line)) or parse(line) == DEFAULTS


# --- YAML -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Writes a config file and gives the arguments that read it."""

    def write(content: str | bytes) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", str(path)]

    return write


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("num_rollouts: 8\nuse_lora: true\n", {"num_rollouts": 8, "use_lora": True}),
        ("learning_rate: 1e-5", {"learning_rate": 0.00001}),  # which YAML itself reads as a string
        ("learning_rate: 0.00001", {"learning_rate": 0.00001}),
        ("beta: 1", {"beta": 1.0}),
        ("data_root: my images", {"data_root": "my images"}),
        ("data_root: 2024", {"data_root": "2024"}),
        ("data_root: --odd", {"data_root": "--odd"}),
        ("data_root: a=b", {"data_root": "a=b"}),
        ("use_lora: false", {}),
        ("freeze: [merger, tower]", {"freeze": "tower,merger"}),
        ("freeze: tower, merger", {"freeze": "tower,merger"}),
        ("freeze:\n- tower\n", {"freeze": "tower"}),
        ("freeze: none", {}),
        ("freeze: null", {}),
        ("use_lora: on\nlora_targets: [merger]", {"use_lora": True, "lora_targets": "merger"}),
        ("use_lora: on", {"use_lora": True}),
        ('use_lora: "true"', {"use_lora": True}),
        ("fixed_correct_index: 2", {"fixed_correct_index": 2}),
        ("fixed_correct_index: none", {"fixed_correct_index": None}),
        ("fixed_correct_index: null", {"fixed_correct_index": None}),
        ("learning_rate: null\noutput_dir: ~\nrevision:\nseed: null", {}),
        ("# nothing but a comment\n{}", {}),
    ],
)
def test_config_file_sets_flags(config, content, expected):
    assert changed(DEFAULTS, parse_all(config(content))) == expected


@pytest.mark.parametrize("flag", FLAGS)
def test_config_file_sets_every_flag(config, flag):
    _, given, value, also = FLAGS[flag]
    assert getattr(parse_all([*also, *config(f"{flag}: {given}")]), flag) == value


@pytest.mark.parametrize("flags", [["--config", "~/run.yaml"], ["--{}=~/mine.py:X"]], ids=["file", "command line"])
@pytest.mark.parametrize("name", ["data_root", "model_id", "output_dir", "env", "reward"])
def test_home_is_understood_wherever_a_path_is_given(tmp_path, monkeypatch, name, flags):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(f"{name}: ~/mine.py:X\n")
    assert getattr(parse_options([flag.format(name) for flag in flags]), name) == f"{tmp_path}/mine.py:X"


@pytest.mark.parametrize("config_first", [True, False])
def test_command_line_wins_over_the_file(config, config_first):
    from_file = config("num_rollouts: 8\nuse_lora: true\nfixed_correct_index: none\nseed: 3")
    given = ["--num_rollouts", "2", "--use_lora", "false", "--fixed_correct_index", "0"]
    options = parse_all([*from_file, *given] if config_first else [*given, *from_file])
    assert changed(DEFAULTS, options) == {"num_rollouts": 2, "seed": 3}


BAD_CONFIGS = {
    "misspelt key": ("num_rollout: 8", "unknown key 'num_rollout', did you mean num_rollouts"),
    "dashes in a key": ("learning-rate: 1", "unknown key 'learning-rate', did you mean learning_rate"),
    "key like nothing": ("xyzzy: 8", "unknown key 'xyzzy'; see --help"),
    "key that is no word": ("1: 8", "unknown key '1'; see --help"),
    "another config file": ("config: other.yaml", "unknown key 'config'"),
    "misspelt key with null": ("num_rollout: null", "unknown key 'num_rollout'"),
    "word for a number": ("num_rollouts: four", "num_rollouts: invalid int value: 'four'"),
    "fraction for a whole number": ("num_rollouts: 4.5", "num_rollouts: invalid int value: '4.5'"),
    "boolean for a number": ("num_rollouts: true", "num_rollouts: invalid int value: 'true'"),
    "number for a boolean": ("use_lora: 1", "use_lora: got '1', wanted true or false"),
    "word that is no choice": ("dtype: float16", "dtype: invalid choice: 'float16'"),
    "list": ("num_rollouts: [2, 4]", "num_rollouts is a list, wanted one value"),
    "part that is none": ("freeze: [tower, vision]", "--freeze: got 'tower,vision', wanted some of tower,merger,"),
    "parts that are none": ("freeze: []", "--freeze: got '', wanted some of tower,merger,"),
    "flag that is no more": ("freeze_vision: true", "key 'freeze_vision': pass --freeze tower,merger; see --help"),
    "section": ("model:\n  model_id: toy", "unknown key 'model'"),
    "mapping": ("model_id:\n  name: toy", "model_id is a dict, wanted one value"),
    "empty file": ("", "holds a NoneType, wanted lines of 'flag: value'"),
    "list of flags": ("- num_rollouts", "holds a list, wanted lines"),
    "bare word": ("toy", "holds a str, wanted lines"),
    "not YAML": ("num_rollouts: [", "is not YAML"),
    "not UTF-8": (b"data_root: \xff", "is not YAML"),
    "nested brackets": (f"seed: {'[' * 5000}{']' * 5000}", "is nested too deep, wanted lines of 'flag: value'"),
    "nested mappings": ("".join(f"{' ' * depth}a:\n" for depth in range(1500)), "is nested too deep"),
    "number of 5,000 digits": (f"seed: {'9' * 5000}", "has 5,007 characters, but wanted at most 4,096"),
    "date that is none": ("seed: 2024-13-45", "seed: invalid int value: '2024-13-45'"),
    "time that YAML takes for seconds": ("train_steps: 1:30", "train_steps: invalid int value: '1:30'"),
    "broken base64": ('seed: !!binary "a"', "is not YAML: failed to decode base64"),
    "key that is a list": ("? [a, b]\n: 1", "found unhashable key"),
    "value of 5,000 characters": (f"data_root: {'x' * 5000}", "has 5,012 characters, but wanted at most 4,096"),
}


def test_numbers_of_a_config_file_are_read_as_the_command_line_reads_them(config):
    # YAML itself makes 8, 1.1 and a date of these
    options = parse_all(
        config("seed: 010\ntrain_steps: 1_000\nlearning_rate: 1e-4\noutput_dir: 1.10\nmodel_id: 2024-01-02")
    )
    assert (options.seed, options.train_steps, options.learning_rate) == (10, 1000, 1e-4)
    assert (options.output_dir, options.model_id) == ("1.10", "2024-01-02")


@pytest.mark.parametrize(("content", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_config_file_is_refused_by_name(config, content, words):
    arguments = config(content)
    with pytest.raises(UsageError, match=re.escape(words)) as refusal:
        parse_all(arguments)
    assert f"config file {arguments[1]}" in str(refusal.value)


def test_a_config_file_that_is_a_folder_is_told_as_one(tmp_path):
    with pytest.raises(UsageError) as refusal:
        parse_all(["--config", str(tmp_path)])
    assert str(refusal.value) == f"config file {tmp_path} is a folder; pass a file that can be read more than once"


def test_impossible_number_in_a_config_file_is_refused(config):
    with pytest.raises(UsageError, match="num_rollouts=1, but leave-one-out"):
        parse_all(config("num_rollouts: 1"))


def test_missing_config_file(tmp_path):
    with pytest.raises(UsageError, match="nowhere.yaml does not exist; correct --config"):
        parse_all(["--config", str(tmp_path / "nowhere.yaml")])


# --- defaults that depend on the case ---------------------------------------------------------------------------------

RESOLVED = (
    "train_steps",
    "per_device_batch_size",
    "steps_per_generation",
    "learning_rate",
    "beta",
    "dtype",
    "image_max_pixels",
    "max_completion_length",
    "gradient_checkpointing",
    "vision_cache_mib",
    "dataloader_num_workers",
    "control_steps",
    "control_episodes",
)
NO_CURVE = (0, 256)
REAL = "--model_id Qwen/Qwen2.5-VL-3B-Instruct"

# the values are of the flags in RESOLVED, but for the last two, which NO_CURVE has
CASES = {
    "toy on a CPU": ("", False, (60, 8, 1, 1e-4, 0.0, "float32", 3136, 32, False, 0, 0)),
    "toy on a GPU": ("", True, (60, 8, 1, 1e-4, 0.0, "bfloat16", 3136, 32, False, 0, 2)),
    "toy with LoRA": ("--use_lora", False, (60, 8, 1, 5e-4, 0.0, "float32", 3136, 32, False, 2048, 0)),
    "real": (REAL, True, (200, 1, 1, 1e-6, 0.0, "bfloat16", 200_704, 64, "auto", 0, 2)),
    "real with LoRA": (f"{REAL} --use_lora", True, (200, 1, 1, 1e-5, 0.0, "bfloat16", 200_704, 64, "auto", 2048, 2)),
    "LoRA on TRL's passes": (
        f"{REAL} --use_lora --shared_prefix false",
        True,
        (200, 1, 1, 1e-5, 0.0, "bfloat16", 200_704, 64, "auto", 0, 2),
    ),
    "frozen vision": ("--freeze tower,merger", False, (60, 8, 1, 1e-4, 0.0, "float32", 3136, 32, False, 2048, 0)),
    "frozen tower": ("--freeze tower", False, (60, 8, 1, 1e-4, 0.0, "float32", 3136, 32, False, 0, 0)),
    "LoRA on vision too": (
        "--use_lora --lora_targets language,merger",
        False,
        (60, 8, 1, 5e-4, 0.0, "float32", 3136, 32, False, 0, 0),
    ),
    "real with reasoning": (
        f"{REAL} --allow_reasoning",
        True,
        (200, 1, 1, 1e-6, 0.0, "bfloat16", 200_704, 512, "auto", 0, 2),
    ),
    "real, accumulating": (
        f"{REAL} --gradient_accumulation_steps 4",
        True,
        (200, 1, 4, 1e-6, 0.0, "bfloat16", 200_704, 64, "auto", 0, 2),
    ),
    "folder": ("--model_id ./my_model", False, (200, 1, 1, 1e-6, 0.0, "float32", 200_704, 64, "auto", 0, 0)),
}


@pytest.mark.parametrize(("line", "has_bf16_gpu", "values"), CASES.values(), ids=CASES.keys())
def test_defaults_of_the_case(line, has_bf16_gpu, values):
    options = parse(line)
    resolved, filled = resolve_options(options, has_bf16_gpu=has_bf16_gpu)
    assert changed(options, resolved) == dict(zip(RESOLVED, (*values, *NO_CURVE), strict=True))
    assert {default.flag: default.value for default in filled} == dict(zip(RESOLVED, (*values, *NO_CURVE), strict=True))
    assert all(default.reason for default in filled)


def test_what_was_given_is_not_filled_in():
    line = (
        "--train_steps 3 --per_device_batch_size 2 --steps_per_generation 5 --learning_rate 0.5 --beta 0 "
        "--dtype float32 --image_max_pixels 784 --max_completion_length 9 --gradient_checkpointing false "
        "--vision_cache_mib 0 --dataloader_num_workers 0 --control_steps 10 --control_episodes 8"
    )
    assert resolve_options(parse(line), has_bf16_gpu=True) == (parse(line), [])


@pytest.mark.parametrize(
    ("line", "every", "num_episodes"),
    [
        ("--eval_steps 25", 25, 256),
        ("--eval_steps 25 --eval_episodes 40", 25, 40),
        ("--eval_steps 25 --control_steps 5", 5, 32),
        ("--control_steps 5", 5, 32),
        ("--eval_steps 25 --control_episodes 16", 25, 16),
        ("--eval_steps 25 --control_steps 0", 0, 32),
    ],
)
def test_the_look_curve_rides_on_evaluation_unless_it_is_asked_for(line, every, num_episodes):
    resolved, _ = resolve_options(parse(line), has_bf16_gpu=False)
    assert (resolved.control_steps, resolved.control_episodes) == (every, num_episodes)


@pytest.mark.parametrize("line", ["--min_completion_length 32", "--use_lora --min_completion_length 40"])
def test_a_least_length_is_compared_with_the_greatest_by_default(line):
    with pytest.raises(UsageError, match="is not below max_completion_length=32, so no completion could end"):
        resolve_options(parse(line), has_bf16_gpu=False)


def test_resolving_twice_changes_nothing():
    resolved, _ = resolve_options(parse(REAL), has_bf16_gpu=True)
    assert resolve_options(resolved, has_bf16_gpu=False) == (resolved, [])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "5000000000"], "seed=5000000000, but it must be below 2147483648"),
        (["--seed", "1" + 400 * "0"], "but it must be below 2147483648"),
        (["--vllm_server_port", "-5"], "vllm_server_port=-5, but it must be from 1 to 65535"),
        (["--vllm_server_port", "65536"], "vllm_server_port=65536"),
        (["--learning_rate", "nan"], "learning_rate=nan, but it must be above 0"),
    ],
)
def test_numbers_no_library_takes_are_refused_here(flags, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse_all(flags)


def test_key_given_twice_in_a_config_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("num_rollouts: 8\nseed: 1\nnum_rollouts: 2\n")
    with pytest.raises(UsageError, match="key 'num_rollouts' is given twice"):
        parse_all(["--config", str(tmp_path / "run.yaml")])


TRAINED = {
    "": {"tower", "merger", "language_model"},
    "--freeze tower": {"merger", "language_model"},
    "--freeze merger": {"tower", "language_model"},
    "--freeze language_model": {"tower", "merger"},
    "--freeze tower,merger": {"language_model"},
    "--freeze tower,language_model": {"merger"},
    "--freeze merger,language_model": {"tower"},
    "--use_lora": {"language_model"},
    "--use_lora --lora_targets vision": {"tower"},
    "--use_lora --lora_targets merger": {"merger"},
    "--use_lora --lora_targets language,merger": {"merger", "language_model"},
    "--use_lora --lora_targets language,vision,merger": {"tower", "merger", "language_model"},
}


@pytest.mark.parametrize(("line", "parts"), TRAINED.items(), ids=TRAINED.keys())
def test_which_parts_train_is_known_from_flags(line, parts):
    assert parse(line).trained_parts == parts


def of_an_adapter(folder: Path, **config: object) -> frozenset[str]:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return parse_all(["--model_id", str(folder), "--use_lora"]).trained_parts


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"target_modules": LORA_TARGETS["language"][1]}, {"language_model"}),
        ({"target_modules": lora_pattern(["vision", "merger"])}, {"tower", "merger"}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"language_model"}),
        # which the tower's blocks have too
        ({"target_modules": ["gate_proj"]}, {"tower", "language_model"}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["merger"]}, {"merger", "language_model"}),
        ({"target_modules": "all-linear"}, {"tower", "merger", "language_model"}),
        ({"target_modules": ["mlp.0"]}, {"merger"}),
    ],
)
def test_which_parts_an_adapter_trains_is_known_from_its_config(config, parts, tmp_path):
    assert of_an_adapter(tmp_path, **config) == parts


def test_an_adapter_that_cannot_be_read_is_for_other_checks_to_refuse(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    options = parse_all(["--model_id", str(tmp_path), "--use_lora"])
    assert resolve_options(options, has_bf16_gpu=False)[0].vision_cache_mib == 2048
