"""The command line from start to end on the toy model: what a run leaves, resume, and runs that cannot be."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText

import training
from environment import judge
from fleet.command.image_check import RunData
from fleet.command.options import parse_options, resolve_options
from fleet.command.preflight import make_environment, own_reward
from fleet.errors import UsageError
from fleet.rl.rollouts import EpisodeRecord, RolloutRecord
from fleet.run.build.settings import make_rloo_config
from fleet.run.build.training import PreparedRun, build_trainer
from fleet.run.records import draw_curve, sample_table
from fleet.run.watchdog import Watchdog
from fleet.run_folder import read_jsonl
from fleet.verdicts import Verdict
from model_utils import count_parameters, generate_tool_call, load_qwen25_vl
from reward import reward_of
from tests import HANG_S
from tests.helpers import REPOSITORY, toy_dataset, toy_path
from utils.images import open_image
from utils.tool_calls import ParseStatus

QUICK = ["--per_device_batch_size", "2", "--sample_steps", "0", "--report_to", "none"]


def run(output_dir: Path, *flags: str) -> Path:
    training.main([*QUICK, "--output_dir", str(output_dir), *flags])
    return output_dir


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("runs") / "whole", "--train_steps", "4", "--save_steps", "2")


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("step_time_s", "rollouts_per_s", "epoch")}


def final_weights(run_dir: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / name)


def assert_bit_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_run_leaves_its_records(uninterrupted: Path) -> None:
    lines = read_jsonl(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {"reward", "accuracy", "parse/ok", "outcome/correct", "groups/mixed", "chosen/3", "step_time_s",
              "rollouts_per_s", "entropy", "grad_norm"}  # fmt: skip
    assert wanted <= lines[0].keys()
    config = json.loads((uninterrupted / "config.json").read_text())
    # known at the end alone
    assert config.pop("measured")["step_s"] > 0
    assert config["options"]["learning_rate"] == 1e-4 and config["options"]["train_steps"] == 4
    assert config["versions"]["trl"] and "commit" in config
    assert Image.open(uninterrupted / "curve.png").width > 600
    for step in (2, 4):
        assert json.loads((uninterrupted / f"checkpoint-{step}" / "run_config.json").read_text()) == config


def test_final_opens_with_from_pretrained_and_answers(uninterrupted: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(uninterrupted / "final")
    saved = final_weights(uninterrupted)
    assert len(saved) == len(model.state_dict())
    model, processor = load_qwen25_vl(str(uninterrupted / "final"))
    answer = generate_tool_call(model, processor, toy_dataset().env.episode(0), max_pixels=56 * 56)
    assert answer.startswith("<tool_call>")
    moved = load_qwen25_vl(toy_path())[0].state_dict()
    assert any(not torch.equal(value, moved[name]) for name, value in model.state_dict().items())


def test_resumed_run_equals_the_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    half = run(tmp_path / "half", "--train_steps", "2", "--save_steps", "2")
    run(half, "--train_steps", "4", "--save_steps", "2", "--resume")
    assert_bit_equal(final_weights(half), final_weights(uninterrupted))
    ours, theirs = read_jsonl(half / "metrics.jsonl"), read_jsonl(uninterrupted / "metrics.jsonl")
    assert [without_times(line) for line in ours] == [without_times(line) for line in theirs]
    assert read_jsonl(half / "rollouts.jsonl") == read_jsonl(uninterrupted / "rollouts.jsonl")


def test_resume_takes_the_weights_of_the_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    half = run(tmp_path / "half", "--train_steps", "2", "--save_steps", "2")
    run(half, "--train_steps", "2", "--resume")
    assert_bit_equal(final_weights(half), load_file(half / "checkpoint-2" / "model.safetensors"))
    base = load_file(Path(toy_path()) / "model.safetensors")
    assert any(not torch.equal(value, base[name]) for name, value in final_weights(half).items())


def test_resumed_lora_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    flags = ["--use_lora", "--save_steps", "2"]
    whole = run(tmp_path / "whole", "--train_steps", "4", *flags)
    half = run(tmp_path / "half", "--train_steps", "2", *flags)
    run(half, "--train_steps", "4", "--resume", *flags)
    name = "adapter_model.safetensors"
    assert_bit_equal(final_weights(half, name), final_weights(whole, name))


def test_a_resumed_run_saves_and_evaluates_at_its_own_intervals(tmp_path: Path) -> None:
    half = run(tmp_path / "half", "--train_steps", "2", "--save_steps", "2")
    run(
        half,
        "--train_steps",
        "5",
        "--save_steps",
        "1",
        "--save_total_limit",
        "9",
        "--eval_steps",
        "2",
        "--eval_episodes",
        "4",
        "--resume",
    )
    assert sorted(path.name for path in half.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 3, 4, 5)]
    assert [line["step"] for line in read_jsonl(half / "evaluations.jsonl")] == [4, 5]


def test_lines_past_the_checkpoint_and_a_torn_line_go_on_resume(uninterrupted: Path, tmp_path: Path) -> None:
    half = run(tmp_path / "half", "--train_steps", "3", "--save_steps", "2")
    shutil.rmtree(half / "checkpoint-3")
    with (half / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "rew')
    run(half, "--train_steps", "4", "--save_steps", "2", "--resume")
    ours, theirs = read_jsonl(half / "metrics.jsonl"), read_jsonl(uninterrupted / "metrics.jsonl")
    assert [without_times(line) for line in ours] == [without_times(line) for line in theirs]


def test_merged_weights_answer_as_the_adapter_does(tmp_path: Path) -> None:
    done = run(tmp_path / "run", "--use_lora", "--merge_lora", "--train_steps", "3")
    adapted, processor = load_qwen25_vl(str(done / "final"))
    merged, _ = load_qwen25_vl(str(done / "final_merged"))
    base, _ = load_qwen25_vl(toy_path())
    text = processor.tokenizer("<|im_start|>Pick the correct image.", return_tensors="pt")
    logits = [model(**text).logits for model in (adapted, merged, base)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.01


def test_adapters_in_the_vision_side_train_merge_and_train_on_at_their_own_rate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rates = ["--vision_learning_rate", "2e-3", "--lr_scheduler_type", "linear", "--train_steps", "2", "--use_lora"]
    first = run(tmp_path / "first", *rates, "--lora_targets", "language,vision,merger", "--merge_lora")
    assert [(line["learning_rate"], line["vision_learning_rate"]) for line in read_jsonl(first / "metrics.jsonl")] == [
        (5e-4, 2e-3),
        (2.5e-4, 1e-3),
    ]
    lines = capfd.readouterr().err.splitlines()
    table = [
        [cell.strip() for cell in line.split("│")] for line in lines if line.startswith(("tower", "merger", "lang"))
    ]
    base, rows = load_qwen25_vl(toy_path())[0], []
    for part, of_part, rate in (
        ("tower", "visual.blocks", "0.002"),
        ("merger", "visual.merger", "0.002"),
        ("language_model", "language_model.layers", "0.0005"),
    ):
        layers = [
            module for name, module in base.named_modules() if of_part in name and hasattr(module, "out_features")
        ]
        # a factor of 16 rows behind a layer's inputs, one of 16 columns before its outputs
        size = sum(16 * (layer.in_features + layer.out_features) for layer in layers)
        rows.append([part, f"{size:,}", f"{count_parameters(base)[part].total + size:,}", f"{size:,}", rate])
    assert table == rows
    adapted, processor = load_qwen25_vl(str(first / "final"))
    episode = toy_dataset().env.episode(0)
    prompt = processor.apply_chat_template(list(episode.messages), tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[prompt], images=[open_image(image, 56 * 56) for image in episode.images], return_tensors="pt"
    )
    logits = [model(**inputs).logits for model in (adapted, load_qwen25_vl(str(first / "final_merged"))[0], base)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.01

    # an adapter's own config says that its vision side trains, so no features are kept
    second = run(tmp_path / "second", *rates, "--model_id", str(first / "final"))
    options = json.loads((second / "config.json").read_text())["options"]
    assert options["vision_cache_mib"] == 0 and options["lora_targets"] is None
    name = "adapter_model.safetensors"
    before, after = final_weights(first, name), final_weights(second, name)
    assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("beta", ["0", "0.05"])
def test_an_adapter_trains_on_and_is_its_own_reference(beta: str, tmp_path: Path) -> None:
    first = run(tmp_path / "first", "--use_lora", "--train_steps", "2", "--learning_rate", "1e-4")
    flags = ["--use_lora", "--model_id", str(first / "final"), "--image_max_pixels", "3136", "--learning_rate", "1e-3",
             "--beta", beta, "--save_steps", "1"]  # fmt: skip
    second = run(tmp_path / "second", "--train_steps", "2", *flags)
    name = "adapter_model.safetensors"
    before, after = final_weights(first, name), final_weights(second, name)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    kls = [line.get("kl") for line in read_jsonl(second / "metrics.jsonl")]
    if beta == "0":
        assert kls == [None, None] and not (second / "final" / "ref").exists()
    else:
        assert kls[0] == 0, "before its first step the policy is the adapter that training began with"
        assert kls[1] != 0
    half = run(tmp_path / "half", "--train_steps", "1", *flags)
    run(half, "--train_steps", "2", "--resume", *flags)
    assert_bit_equal(final_weights(half, name), after)


def test_failed_start_keeps_the_run_that_it_was_to_overwrite(uninterrupted: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(uninterrupted, tmp_path / "kept")
    broken = shutil.copytree(toy_path(), tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[3:]}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="its files lack 3 weights"):
        run(kept, "--overwrite", "--model_id", str(broken))
    assert_bit_equal(final_weights(kept), final_weights(uninterrupted))
    with pytest.raises(UsageError, match="its files lack 3 weights"):
        run(tmp_path / "new", "--model_id", str(broken))
    assert not (tmp_path / "new").exists(), "the corrected command can use the same folder"


def test_overwrite_leaves_nothing_of_the_run_before(uninterrupted: Path, tmp_path: Path) -> None:
    again = shutil.copytree(uninterrupted, tmp_path / "again")
    run(again, "--overwrite", "--train_steps", "1")
    assert [line["step"] for line in read_jsonl(again / "metrics.jsonl")] == [1]
    assert not (again / "checkpoint-4").exists()


def test_every_step_is_logged_when_generations_are_reused(tmp_path: Path) -> None:
    done = run(tmp_path / "run", "--num_iterations", "2", "--train_steps", "4")
    lines = read_jsonl(done / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert ["reward" in line for line in lines] == [True, False, True, False]
    assert all(line["grad_norm"] is not None and line["step_time_s"] > 0 for line in lines)


# what a flag of the same name needs beside it to have a part in the run
BESIDE = {
    "epsilon": ["--num_iterations", "2"],
    "epsilon_high": ["--num_iterations", "2"],
    "vllm_mode": ["--use_vllm"],
    "vllm_server_host": ["--use_vllm", "--vllm_mode", "server"],
    "vllm_server_port": ["--use_vllm", "--vllm_mode", "server"],
    "vllm_gpu_memory_utilization": ["--use_vllm"],
    "vllm_tensor_parallel_size": ["--use_vllm"],
    "vllm_max_model_length": ["--use_vllm"],
    "vllm_enable_sleep_mode": ["--use_vllm"],
}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
# flag, value, TRL's argument, its value
REACHES_TRL = [
    ("per_device_batch_size", "3", "per_device_train_batch_size", 12),
    ("num_rollouts", "5", "num_generations", 5),
    ("train_steps", "7", "max_steps", 7),
    ("gradient_accumulation_steps", "2", "gradient_accumulation_steps", 2),
    ("steps_per_generation", "4", "steps_per_generation", 4),
    ("num_iterations", "3", "num_iterations", 3),
    ("learning_rate", "0.5", "learning_rate", 0.5),
    ("lr_scheduler_type", "cosine", "lr_scheduler_type", "cosine"),
    ("weight_decay", "0.1", "weight_decay", 0.1),
    ("max_grad_norm", "2", "max_grad_norm", 2.0),
    ("beta", "0.3", "beta", 0.3),
    ("epsilon", "0.3", "epsilon", 0.3),
    ("epsilon_high", "0.4", "epsilon_high", 0.4),
    ("normalize_advantages", "true", "normalize_advantages", True),
    ("mask_truncated_completions", "true", "mask_truncated_completions", True),
    ("gradient_checkpointing", "true", "gradient_checkpointing", True),
    ("temperature", "0.7", "temperature", 0.7),
    ("top_p", "0.9", "top_p", 0.9),
    ("top_k", "40", "top_k", 40),
    ("min_p", "0.1", "min_p", 0.1),
    ("repetition_penalty", "1.5", "repetition_penalty", 1.5),
    ("min_completion_length", "9", "generation_kwargs", {"min_new_tokens": 9}),
    ("max_completion_length", "9", "max_completion_length", 9),
    ("ds3_gather_for_generation", "true", "ds3_gather_for_generation", True),
    ("vllm_mode", "server", "vllm_mode", "server"),
    ("vllm_server_host", "10.0.0.9", "vllm_server_host", "10.0.0.9"),
    ("vllm_server_port", "9000", "vllm_server_port", 9000),
    ("vllm_gpu_memory_utilization", "0.5", "vllm_gpu_memory_utilization", 0.5),
    ("vllm_tensor_parallel_size", "2", "vllm_tensor_parallel_size", 2),
    ("vllm_max_model_length", "2048", "vllm_max_model_length", 2048),
    ("vllm_enable_sleep_mode", "true", "vllm_enable_sleep_mode", True),
    ("use_vllm", "true", "use_vllm", True),
    ("output_dir", "there", "output_dir", "there"),
    ("seed", "11", "seed", 11),
    ("save_steps", "6", "save_steps", 6),
    ("logging_steps", "8", "logging_steps", 8),
    ("report_to", "none", "report_to", []),
    ("dataloader_num_workers", "2", "dataloader_num_workers", 2),
    ("dtype", "bfloat16", "bf16", True),
]


@pytest.mark.parametrize(("flag", "text", "argument", "value"), REACHES_TRL)
def test_flag_reaches_trl(flag: str, text: str, argument: str, value: Any) -> None:
    def argument_with(flags: list[str]) -> Any:
        options, _ = resolve_options(parse_options(flags, ZERO3), has_bf16_gpu=False)
        return getattr(make_rloo_config(options), argument)

    beside = BESIDE.get(flag, [])
    assert argument_with([*beside, f"--{flag}", text]) == value != argument_with(beside)


def test_warmup_reaches_trl() -> None:
    flags = ["--warmup_steps", "5", "--lr_scheduler_type", "constant_with_warmup"]
    options, _ = resolve_options(parse_options(flags), has_bf16_gpu=False)
    assert make_rloo_config(options).warmup_steps == 5


def test_flags_of_model_and_task_reach_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--freeze", "tower,merger", "--attn_implementation", "eager", "--reward_correct", "0.5",
             "--reward_valid_call", "0.25", "--allow_reasoning", "--image_max_pixels", "1600",
             "--max_skipped_steps", "3", "--save_total_limit", "3", "--output_dir", str(tmp_path)]  # fmt: skip
    options, _ = resolve_options(parse_options(flags), has_bf16_gpu=False)
    env = make_environment(options, options.seed)
    run = PreparedRun(options, make_rloo_config(options), RunData(env), plan=None, look=None)
    trainer, checkpoint = build_trainer(run, tmp_path, toy_path(), Watchdog(60, 0), None)
    assert checkpoint is None
    assert not any(weight.requires_grad for weight in trainer.model.model.visual.parameters())
    assert trainer.model.model.language_model.config._attn_implementation == "eager"
    right = 'because <tool_call>{"name": "pick_image", "arguments": {"index": 0}}</tool_call>'
    wrong = right.replace("0", "1")
    verdicts = [judge(text, 0, 4, allow_reasoning=trainer.settings.allow_reasoning) for text in (right, wrong)]
    assert [reward_of(verdict, trainer.settings.reward_weights) for verdict in verdicts] == [0.75, 0.25]
    assert trainer.reward_guard is None and trainer.step_guard.max_in_a_row == 3
    (tmp_path / "reward.py").write_text("def score(completions, **columns): return [1.0 for _ in completions]")
    reward = own_reward(parse_options(["--reward", f"{tmp_path}/reward.py:score", "--reward_timeout_s", "7"]))
    assert reward is not None
    with contextlib.closing(reward):
        assert reward.timeout_s == 7
    assert trainer.settings.allow_reasoning
    assert trainer.checkpoints.keep == 3 and trainer.args.save_total_limit is None
    assert trainer.train_dataset[0]["images"][0].size == (40, 40)


def test_tensorboard_holds_figures_and_completions_beside_their_pictures(tmp_path: Path) -> None:
    training.main(["--per_device_batch_size", "2", "--sample_steps", "1", "--train_steps", "1",
                   "--dataloader_num_workers", "1", "--output_dir", str(tmp_path / "run")])  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1]
    assert events.Images("samples/0")[0].step == 1
    assert "samples/completions/text_summary" in events.Tags()["tensors"]


def test_every_rollout_is_kept_with_what_it_was_shown(uninterrupted: Path) -> None:
    groups = read_jsonl(uninterrupted / "rollouts.jsonl")
    assert [(group["step"], group["group"]) for group in groups] == [(s, g) for s in (1, 2, 3, 4) for g in (0, 1)]
    lines = read_jsonl(uninterrupted / "metrics.jsonl")
    episodes = toy_dataset().env
    for line, number in zip(groups, range(8), strict=True):
        episode = episodes.episode(number)
        assert line["labels"] == list(episode.labels) and line["correct_index"] == episode.correct_index == 0
        assert line["instruction"] == "Pick the correct image. The index is from 0 to 3."
        for name, source in zip(line["images"], episode.images, strict=True):
            shown, wanted = Image.open(uninterrupted / "thumbnails" / name), open_image(source, 56 * 56)
            # the copy is compressed, so it is near
            assert ImageStat.Stat(ImageChops.difference(shown.convert("RGB"), wanted)).mean < [12, 12, 12]
        assert sum(rollout["advantage"] for rollout in line["rollouts"]) == pytest.approx(0, abs=1e-5)
        for rollout in line["rollouts"]:
            verdict = judge(rollout["completion"], 0, 4)
            assert (rollout["outcome"], rollout["parse_status"]) == (verdict.outcome, verdict.parse_status)
    for step, line in enumerate(lines, start=1):
        rewards = [r["reward"] for group in groups if group["step"] == step for r in group["rollouts"]]
        assert sum(rewards) / len(rewards) == pytest.approx(line["reward"])
    assert len(list((uninterrupted / "thumbnails").iterdir())) == len({n for g in groups for n in g["images"]})
    assert "report.html" in {path.name for path in uninterrupted.iterdir()}


def test_a_run_that_learns_nothing_is_told_so_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # every completion is cut off in the middle of its call
    run(tmp_path / "run", "--train_steps", "24", "--max_completion_length", "8")
    shown = capfd.readouterr().err
    assert shown.count("raise --max_completion_length") == 1
    assert shown.count("step 20: ") == 1


def test_table_and_bar_show_the_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run", "--train_steps", "1", "--sample_steps", "1")
    shown = capfd.readouterr().err
    assert "step 1: sample completions" in shown and "step 1/1: reward " in shown and ", accuracy " in shown


def test_other_flags_on_resume_are_refused_by_name(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match=r"learning_rate \(was 0.0001, now 0.5\)"):
        run(uninterrupted, "--train_steps", "8", "--save_steps", "2", "--resume", "--learning_rate", "0.5")
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_dry_run_checks_the_documented_32b_command_and_writes_nothing(tmp_path: Path) -> None:
    command = (
        "--model_id Qwen/Qwen2.5-VL-32B-Instruct --data_root ./toy_images --train_steps 200 "
        "--per_device_batch_size 1 --num_rollouts 4 --use_lora false --fixed_correct_index 0"
    )
    page = (REPOSITORY / "docs" / "many_gpus.md").read_text()
    assert command.replace(" ", "") in page.replace(" ", "").replace("\\\n", "")
    assumed = ["--assume_gpus", "8x80", "--assume_accelerate", str(REPOSITORY / "accelerate_config.yaml")]
    training.main([*command.split(), "--output_dir", str(tmp_path / "none"), "--dry_run", *assumed])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_rolouts", "4"], "unknown flag --num_rolouts, did you mean --num_rollouts?"),
        (["--num_rollouts", "1"], "leave-one-out needs at least 2"),
        (["--data_root", "nowhere"], "data folder nowhere does not exist"),
        (["--fixed_correct_index", "4"], "fixed_correct_index=4"),
        (["--model_id", "./no_model"], "model_id=./no_model is no folder"),
    ],
)
def test_a_run_that_cannot_be_exits_with_code_2_and_one_line(flags: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "training.py", *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_S
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_model_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "training.py", "--model_id", "Qwen/no-such-model", "--output_dir", str(tmp_path / "run")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_S, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "model Qwen/no-such-model cannot be loaded" in done.stderr


def test_help_needs_no_torch_and_names_every_group() -> None:
    code = "import sys, training\ntry: training.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert all(f"\n{group}" in done.stdout for group in ("model:", "task:", "RLOO", "generation:", "run:"))


def test_curve_is_drawn_from_the_metrics(tmp_path: Path) -> None:
    draw_curve([{"step": 1, "reward": 0.2, "accuracy": 0.1}, {"step": 2, "reward": 0.9}], tmp_path / "c.png", "t")
    flat = Image.open(tmp_path / "c.png").convert("RGB")
    assert len(flat.getcolors(maxcolors=1_000_000) or []) > 10


def test_sample_table_shows_control_characters_as_text(uninterrupted: Path) -> None:

    episode = EpisodeRecord("Pick the red circle.", "red circle", 2, ("",) * 4, ("",) * 4, solution="2")
    refused = Verdict("unparsable", is_right=False, parse_status=ParseStatus.NO_CALL)
    bad = RolloutRecord(episode, "\x1b[2J<tool_call>\n[red]", refused, 0.0, -0.5)
    table = sample_table([bad], step=7)
    assert "step 7" in table and r"\x1b[2J<tool_call>\n[red]" in table and "unparsable: no_call" in table
    assert "2 (red circle)" in table and "-0.50" in table
