"""A flag that would do nothing in this run is refused if it was given, and null in config.json if it was not."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fleet.command.evaluate_options import EvaluateOptions, parse_evaluate_options
from fleet.command.idle_flags import IDLE_IN_EVALUATION, IDLE_IN_TRAINING, idle_flags, is_zero3
from fleet.command.image_check import RunData
from fleet.command.options import Options, own_code, parse_options, resolve_options
from fleet.command.resume_check import require_same_run
from fleet.errors import UsageError
from fleet.model_folder.parts import lora_pattern
from fleet.run.config import config_text

pytestmark = pytest.mark.fast

ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
HUB = "--model_id Qwen/Qwen2.5-VL-3B-Instruct"

Row = tuple[str, str, str, str, str]
# flag, value, flags beside which it does nothing, why, flags beside which it does something
TRAINING = [
    *(
        (flag, "kind", "", "a folder of images has no columns, .*; pass a data set", "--data_root hub:owner/name")
        for flag in ("image_column", "label_column", "split")
    ),
    (
        "env_args",
        '{"side": 3}',
        "",
        "takes its arguments from flags of their names; add --env",
        "--env my_env.py:MyEnv",
    ),
    ("max_context_length", "900", "", "a conversation of one turn ends with it; add --max_turns 2", "--max_turns 2"),
    ("revision", "v1", "", "only a hub model has revisions; pass a hub id", HUB),
    ("env_args", "{}", "", "PickImageEnv takes its arguments from flags of their names; add --env", "--env a.py:A"),
    ("lora_rank", "64", "", "no adapter is trained; add --use_lora true", "--use_lora"),
    ("lora_alpha", "32", "", "no adapter is trained", "--use_lora"),
    ("lora_dropout", "0", "", "no adapter is trained", "--use_lora"),
    ("lora_rank", "64", "--use_lora --model_id adapter", "the adapter in --model_id keeps its own", "--use_lora"),
    ("lora_alpha", "64", "--use_lora --model_id adapter", "keeps its own; pass its base model", "--use_lora"),
    ("lora_dropout", "0.1", "--use_lora --model_id adapter", "keeps its own", "--use_lora"),
    ("merge_lora", "true", "", "there is no adapter to merge; add --use_lora true", "--use_lora"),
    ("lora_targets", "language", "", "no adapter is trained; add --use_lora true", "--use_lora"),
    ("lora_targets", "vision", "--use_lora --model_id adapter", "the adapter in --model_id keeps its", "--use_lora"),
    ("freeze", "tower", "--use_lora", "LoRA freezes every weight but its adapters'; choose their parts by", ""),
    ("freeze", "language_model", "--use_lora --model_id adapter", "LoRA freezes every weight", ""),
    ("vision_learning_rate", "1e-05", "--freeze tower,merger", "nothing of the vision side trains", "--freeze tower"),
    (
        "vision_learning_rate",
        "1e-05",
        "--use_lora",
        "trains; let some of it train .see --freeze and --lora_targets.",
        "--use_lora --lora_targets language,merger",
    ),
    ("vision_learning_rate", "1.0", "--use_lora --model_id adapter", "nothing of the vision side trains", ""),
    ("vision_learning_rate", "1.0", "--use_lora --model_id sighted", "the vision side alone trains", ""),
    ("vision_learning_rate", "1.0", "--freeze language_model", "the vision side alone trains, .*; pass that", ""),
    ("vision_cache_mib", "64", "", "the vision side trains, .*; add --freeze tower,merger", "--freeze tower,merger"),
    ("vision_cache_mib", "64", "--freeze merger", "the vision side trains, .*", "--freeze merger,tower"),
    (
        "vision_cache_mib",
        "64",
        "--use_lora --lora_targets language,vision",
        "adapters in the vision side train, .*; train adapters in the language model alone",
        "--use_lora",
    ),
    ("vision_cache_mib", "64", "--use_lora --model_id sighted", "adapters in the vision side train", "--use_lora"),
    ("vision_cache_mib", "64", "--use_lora --shared_prefix false", "TRL's own passes take no features", "--use_lora"),
    ("reward_timeout_s", "60", "", "no reward function of your own is called; add --reward", "--reward my.py:f"),
    ("reward_correct", "0.95", "--reward my.py:f", "the function of --reward has its own values; drop --reward", ""),
    ("reward_valid_call", "0.1", "--reward my.py:f", "the function of --reward has its own values", ""),
    ("warmup_steps", "5", "", "does not warm up; add --lr_scheduler_type constant_with", "--lr_scheduler_type linear"),
    ("epsilon", "0.2", "", "each generation serves one optimizer step, whose ratio is 1", "--num_iterations 2"),
    ("epsilon_high", "0.3", "--gradient_accumulation_steps 2", "serves one", "--steps_per_generation 2"),
    ("vllm_mode", "colocate", "", "vLLM does not generate; add --use_vllm true", "--use_vllm"),
    ("vllm_server_host", "h", "", "vLLM does not generate", "--use_vllm --vllm_mode server"),
    ("vllm_server_port", "1", "", "vLLM does not generate", "--use_vllm --vllm_mode server"),
    ("vllm_gpu_memory_utilization", "0.3", "", "vLLM does not generate", "--use_vllm"),
    ("vllm_tensor_parallel_size", "1", "", "vLLM does not generate", "--use_vllm"),
    ("vllm_max_logprob_gap", "1", "", "vLLM does not generate", "--use_vllm"),
    ("vllm_max_model_length", "2048", "", "vLLM does not generate", "--use_vllm"),
    ("vllm_enable_sleep_mode", "true", "", "vLLM does not generate", "--use_vllm"),
    ("rollout_correction", "truncate", "", "Fleet draws from the trainer's own probabilities, so each", "--use_vllm"),
    ("rollout_correction_cap", "2", "", "vLLM does not generate", "--use_vllm"),
    ("rollout_correction_cap", "3", "--use_vllm --rollout_correction none", "rollouts have no weights", "--use_vllm"),
    ("vllm_server_host", "h", "--use_vllm", "vLLM runs beside training; add", "--use_vllm --vllm_mode server"),
    ("vllm_server_port", "1", "--use_vllm", "vLLM runs beside training", "--use_vllm --vllm_mode server"),
    ("vllm_gpu_memory_utilization", "0.3", "--use_vllm --vllm_mode server", "the server was started", "--use_vllm"),
    ("vllm_tensor_parallel_size", "2", "--use_vllm --vllm_mode server", "the server was started", "--use_vllm"),
    ("vllm_max_model_length", "2048", "--use_vllm --vllm_mode server", "the server was started", "--use_vllm"),
    ("vllm_enable_sleep_mode", "true", "--use_vllm --vllm_mode server", "keeps its own memory", "--use_vllm"),
    ("ds3_gather_for_generation", "true", "--use_vllm", "vLLM generates and nothing is evaluated", ""),
    ("eval_episodes", "256", "", "nothing is evaluated; add --eval_steps 50", "--eval_steps 1"),
    ("eval_seed", "7", "--eval_steps 0", "nothing is evaluated", "--eval_steps 1"),
    ("eval_seed", "7", "--eval_steps 1 --control_steps 0 --eval_steps 0", "nothing is evaluated", "--control_steps 1"),
    ("control_episodes", "8", "", "no look curve is taken; add --control_steps 50", "--control_steps 1"),
    ("control_episodes", "8", "--eval_steps 1 --control_steps 0", "no look curve is taken", "--eval_steps 1"),
    (
        "stop_if_blind",
        "stop",
        "--fixed_correct_index none",
        "no look curve is taken; add --control_steps 50",
        "--control_steps 1 --fixed_correct_index none",
    ),
    (
        "stop_if_blind",
        "warn",
        "--control_steps 1",
        "the right index is always the same, so a policy need not look; add --fixed_correct_index none",
        "--eval_steps 1 --env a.py:A",
    ),
    ("keep_best", "true", "", "nothing is evaluated", "--eval_steps 1"),
    ("assume_gpus", "8x80", "", "a run has the machine that it has; add --dry_run", "--dry_run"),
    ("assume_accelerate", "a.yaml", "", "a run has the machine that it has", "--dry_run --assume_gpus 8x80"),
    (
        "assume_accelerate",
        "a.yaml",
        "--dry_run",
        "planned for as it is; add --assume_gpus",
        "--dry_run --assume_gpus 1x8",
    ),
    ("json", "true", "", "only a dry run answers in one object; add --dry_run", "--dry_run"),
    ("trust_checkpoint", "true", "--resume false", "no checkpoint is read", "--resume auto --output_dir runs/one"),
]
EVALUATION = [
    *(
        (flag, "kind", "", "a folder of images has no columns, .*; pass a data set", "--data_root hub:owner/name")
        for flag in ("image_column", "label_column", "split")
    ),
    (
        "env_args",
        '{"side": 3}',
        "",
        "takes its arguments from flags of their names; add --env",
        "--env my_env.py:MyEnv",
    ),
    ("max_context_length", "900", "", "a conversation of one turn ends with it", "--max_turns 2"),
    ("revision", "v1", "--baseline toy", "only a hub model has revisions", "--baseline Qwen/Qwen2.5-VL-3B-Instruct"),
    ("env_args", "{}", "", "PickImageEnv takes its arguments from flags of their names", "--env a.py:A"),
    ("temperature", "1", "--num_samples 0", "no sample is drawn; pass --num_samples 4", ""),
    ("top_p", "0.5", "--num_samples 0", "no sample is drawn", ""),
    ("top_k", "9", "--num_samples 0", "no sample is drawn", ""),
    ("min_p", "0.5", "--num_samples 0", "no sample is drawn", ""),
    ("seed", "0", "--num_samples 0", "no sample is drawn", ""),
    ("allow_reasoning", "true", "--prompt_style direct", "--prompt_style says what is asked", ""),
]
# each does something in every run, or is refused beside others by a rule of its own
ALWAYS_IN_TRAINING = {
    "model_id", "dtype", "attn_implementation", "load_in_4bit", "data_root", "bad_images", "env",
    "candidates_per_episode", "fixed_correct_index", "allow_reasoning", "max_turns", "image_max_pixels",
    "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "min_completion_length",
    "max_completion_length", "seed", "use_lora", "reward", "train_steps", "num_rollouts", "dynamic_sampling",
    "per_device_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations", "learning_rate",
    "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_skipped_steps", "beta", "normalize_advantages",
    "mask_truncated_completions", "gradient_checkpointing", "shared_prefix", "use_vllm", "eval_steps", "control_steps",
    "output_dir", "overwrite", "resume", "save_steps", "save_total_limit", "logging_steps", "sample_steps", "report_to",
    "dataloader_num_workers", "step_timeout_s", "dry_run",
}  # fmt: skip
ALWAYS_IN_EVALUATION = {
    "model_id", "dtype", "attn_implementation", "load_in_4bit", "data_root", "bad_images", "env",
    "candidates_per_episode", "fixed_correct_index", "max_turns", "image_max_pixels", "max_completion_length",
    "eval_episodes",
    "repetition_penalty", "min_completion_length",
    "eval_seed", "baseline", "prompt_style", "num_samples", "pass_k", "per_device_batch_size", "output",
    "overwrite",
}  # fmt: skip


@pytest.fixture(autouse=True)
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders `adapter`, of the language model, and `sighted`, of the vision side; their base is on the hub."""
    monkeypatch.chdir(tmp_path)
    for name, target in (("adapter", "language"), ("sighted", "vision")):
        config = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct", "target_modules": lora_pattern([target])}
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps(config))


def refusal_of(parse: Any, row: Row) -> str:
    flag, value, beside, words, _ = row
    with pytest.raises(UsageError, match=f"^{flag}=.*, but .*{words}.* or drop --{flag}$") as refusal:
        parse([f"--{flag}", value, *beside.split()], ZERO3)
    return str(refusal.value)


@pytest.mark.parametrize("row", TRAINING, ids=lambda row: f"{row[0]} beside {row[2]}")
def test_a_flag_that_does_nothing_is_refused_in_training(row: Row) -> None:
    flag, value, beside, _, in_use = row
    refusal_of(parse_options, row)
    parse_options(beside.split(), ZERO3)
    assert flag not in idle_flags(parse_options([f"--{flag}", value, *in_use.split()], ZERO3), ZERO3)


@pytest.mark.parametrize("row", EVALUATION, ids=lambda row: f"{row[0]} beside {row[2]}")
def test_a_flag_that_does_nothing_is_refused_in_evaluation(row: Row) -> None:
    flag, value, beside, _, in_use = row
    refusal_of(parse_evaluate_options, row)
    parse_evaluate_options(beside.split(), ZERO3)
    parse_evaluate_options([f"--{flag}", value, *in_use.split()], ZERO3)


@pytest.mark.parametrize("parse", [parse_options, parse_evaluate_options])
def test_gathering_shards_is_refused_without_shards(parse: Any) -> None:
    gather = ["--ds3_gather_for_generation"]
    assert parse(gather, ZERO3).ds3_gather_for_generation
    with pytest.raises(UsageError, match="DeepSpeed ZeRO-3 alone; launch with --config_file accelerate_config.yaml or"):
        parse(gather, {})


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_every_flag_is_in_the_table_or_always_in_force(kind: str) -> None:
    table, always, options = {
        "training": (IDLE_IN_TRAINING, ALWAYS_IN_TRAINING, Options),
        "evaluation": (IDLE_IN_EVALUATION, ALWAYS_IN_EVALUATION, EvaluateOptions),
    }[kind]
    may_be_idle = {flag for entry in table for flag in entry.flags}
    assert not may_be_idle & always
    assert may_be_idle | always == {field.name for field in dataclasses.fields(options)}


def test_every_entry_of_the_table_is_tested_above() -> None:
    refusals = [refusal_of(parse_options, row) for row in TRAINING]
    refusals += [refusal_of(parse_evaluate_options, row) for row in EVALUATION]
    untested = [
        (flag, entry.reason)
        for entry in (*IDLE_IN_TRAINING, *IDLE_IN_EVALUATION)
        for flag in entry.flags
        if not any(refusal.startswith(f"{flag}=") and entry.reason in refusal for refusal in refusals)
    ]
    without_shards = ("ds3_gather_for_generation", "weights are sharded under DeepSpeed ZeRO-3 alone")
    assert untested == [without_shards, without_shards]


def test_a_flag_counts_as_given_in_a_file_too_and_whatever_its_value(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora_rank: 16\n")
    with pytest.raises(UsageError, match="lora_rank=16, but no adapter is trained"):
        parse_options(["--config", str(tmp_path / "run.yaml")])
    assert parse_options(["--config", str(tmp_path / "run.yaml"), "--use_lora"]).lora_rank == 16


@pytest.mark.parametrize(
    "off",
    ["--merge_lora false", "--vision_cache_mib 0", "--warmup_steps 0", "--keep_best false",
     "--stop_if_blind none", "--rollout_correction none", "--vllm_enable_sleep_mode false"],
)  # fmt: skip
def test_what_asks_for_nothing_may_be_given(off: str) -> None:
    parse_options(off.split())


def resolved(line: str) -> Options:
    return resolve_options(parse_options(line.split(), {}), has_bf16_gpu=False)[0]


def recorded(line: str) -> dict[str, Any]:
    """The config.json of a run with these flags."""
    no_environment: Any = None
    options, others = resolved(line), {"run_id": "id", "num_episodes": 8, "num_processes": 1}
    flags = dataclasses.asdict(options)
    return json.loads(config_text(flags, idle_flags(options), own_code(options), RunData(no_environment), **others))


def resume(options: Options) -> None:
    require_same_run(options, dataclasses.asdict(options), idle_flags(options, {}), 1)


def test_config_json_has_null_for_what_had_no_part() -> None:
    full, lora = recorded(""), recorded("--use_lora --lora_rank 4 --eval_steps 2")
    nothing = ["control_episodes", "epsilon", "eval_episodes", "eval_seed", "lora_alpha", "lora_dropout", "lora_rank",
               "lora_targets", "reward_timeout_s", "rollout_correction", "rollout_correction_cap", "stop_if_blind",
               "vllm_gpu_memory_utilization", "vllm_max_logprob_gap", "vllm_mode", "vllm_server_host",
               "vllm_server_port", "vllm_tensor_parallel_size"]  # fmt: skip
    assert full["idle_flags"] == nothing
    assert [full["options"][name] for name in nothing] == [None] * len(nothing)
    assert [lora["options"][name] for name in ("lora_rank", "lora_alpha", "eval_episodes")] == [4, 32, 256]
    beside_an_adapter = recorded("--use_lora --model_id adapter")
    assert beside_an_adapter["options"]["lora_rank"] is None and "lora_rank" in beside_an_adapter["idle_flags"]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("", ""),
        ("", "--eval_steps 2 --eval_episodes 8 --eval_seed 5"),
        ("--eval_steps 2 --eval_seed 5", ""),
        ("--use_lora --lora_rank 4", "--use_lora --lora_rank 4"),
    ],
)
def test_a_run_resumes_whatever_had_no_part(before: str, now: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(recorded(f"--output_dir {run} {before}")))
    resume(resolved(f"--output_dir {run} --resume {now}"))


def test_a_run_of_before_this_rule_resumes(tmp_path: Path) -> None:
    options = resolved(f"--output_dir {tmp_path} --resume")
    (tmp_path / "config.json").write_text(json.dumps({"options": dataclasses.asdict(options)}))
    resume(options)


def test_what_has_a_part_must_still_be_the_same(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --num_iterations 2 --use_lora"
    (tmp_path / "config.json").write_text(json.dumps(recorded(line)))
    with pytest.raises(UsageError, match=r"epsilon_high \(was None, now 0.3\), lora_rank \(was 16, now 8\); pass the"):
        resume(resolved(f"{line} --resume --epsilon_high 0.3 --lora_rank 8"))


def test_what_evaluation_takes_from_a_run_is_not_given(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    line = "--temperature 0.5 --allow_reasoning --eval_steps 1"
    (run / "config.json").write_text(json.dumps(recorded(line)))
    options = parse_evaluate_options(
        ["--model_id", str(run / "final"), "--num_samples", "0", "--prompt_style", "direct"]
    )
    assert (options.temperature, options.allow_reasoning) == (0.5, True)


@pytest.mark.parametrize(
    ("variables", "is_sharded"),
    [
        ({}, False),
        (ZERO3, True),
        (ZERO3 | {"ACCELERATE_USE_DEEPSPEED": "false"}, False),
        (ZERO3 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "three.json"}, True),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "two.json"}, False),
    ],
)
def test_zero3_is_what_the_launcher_was_told(variables: dict[str, str], is_sharded: bool) -> None:
    for name, stage in (("two", 2), ("three", 3)):
        Path(f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    assert is_zero3(variables) is is_sharded


def test_config_json_keeps_every_name() -> None:
    assert recorded("")["options"].keys() == dataclasses.asdict(resolved("")).keys()
