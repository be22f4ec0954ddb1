"""The command line from start to end on the toy model: what a run leaves, resume, and runs that cannot be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import training
from flags import UsageError
from model_utils import generate_tool_call, load_qwen25_vl
from run_records import draw_curve, read_metrics, sample_table
from tests.helpers import REPOSITORY, toy_dataset, toy_path

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
    lines = read_metrics(uninterrupted / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {"reward", "accuracy", "parse/ok", "outcome/correct", "groups/mixed", "chosen_index/3", "step_time_s",
              "rollouts_per_s", "entropy", "grad_norm"}  # fmt: skip
    assert wanted <= lines[0].keys()
    config = json.loads((uninterrupted / "config.json").read_text())
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
    ours, theirs = read_metrics(half / "metrics.jsonl"), read_metrics(uninterrupted / "metrics.jsonl")
    assert [without_times(line) for line in ours] == [without_times(line) for line in theirs]


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


def test_lines_past_the_checkpoint_and_a_torn_line_go_on_resume(uninterrupted: Path, tmp_path: Path) -> None:
    half = run(tmp_path / "half", "--train_steps", "3", "--save_steps", "2")
    shutil.rmtree(half / "checkpoint-3")
    with (half / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "rew')
    run(half, "--train_steps", "4", "--save_steps", "2", "--resume")
    ours, theirs = read_metrics(half / "metrics.jsonl"), read_metrics(uninterrupted / "metrics.jsonl")
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


@pytest.mark.parametrize("beta", ["0", "0.05"])
def test_an_adapter_trains_on_and_is_its_own_reference(beta: str, tmp_path: Path) -> None:
    first = run(tmp_path / "first", "--use_lora", "--train_steps", "2")
    flags = ["--use_lora", "--model_id", str(first / "final"), "--image_max_pixels", "3136", "--learning_rate", "1e-3",
             "--beta", beta, "--save_steps", "1"]  # fmt: skip
    second = run(tmp_path / "second", "--train_steps", "2", *flags)
    name = "adapter_model.safetensors"
    before, after = final_weights(first, name), final_weights(second, name)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    kls = [line.get("kl") for line in read_metrics(second / "metrics.jsonl")]
    if beta == "0":
        assert kls == [None, None] and not (second / "final" / "ref").exists()
    else:
        assert kls[0] == 0, "before its first step the policy is the adapter that training began with"
        assert kls[1] != 0
    half = run(tmp_path / "half", "--train_steps", "1", *flags)
    run(half, "--train_steps", "2", "--resume", *flags)
    assert_bit_equal(final_weights(half, name), after)


def test_other_flags_on_resume_are_refused_by_name(uninterrupted: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match=r"learning_rate \(was 0.0001, now 0.5\)"):
        run(uninterrupted, "--train_steps", "8", "--save_steps", "2", "--resume", "--learning_rate", "0.5")
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_dry_run_checks_the_readmes_32b_command_and_writes_nothing(tmp_path: Path) -> None:
    command = (
        "--model_id Qwen/Qwen2.5-VL-32B-Instruct --data_root ./toy_images --train_steps 200 "
        "--per_device_batch_size 1 --num_rollouts 4 --use_lora false --fixed_correct_index 0"
    )
    assert command.replace(" ", "") in (REPOSITORY / "README.md").read_text().replace(" ", "").replace("\\\n", "")
    training.main([*command.split(), "--output_dir", str(tmp_path / "none"), "--dry_run"])
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
        [sys.executable, "training.py", *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_model_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "training.py", "--model_id", "Qwen/no-such-model", "--output_dir", str(tmp_path / "run")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert "model Qwen/no-such-model cannot be loaded" in done.stderr


def test_help_needs_no_torch_and_names_every_group() -> None:
    code = "import sys, training\ntry: training.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"\n{group}" in done.stdout for group in ("model:", "task:", "RLOO", "generation:", "run:"))


def test_curve_is_drawn_from_the_metrics(tmp_path: Path) -> None:
    draw_curve([{"step": 1, "reward": 0.2, "accuracy": 0.1}, {"step": 2, "reward": 0.9}], tmp_path / "c.png", "t")
    flat = Image.open(tmp_path / "c.png").convert("RGB")
    assert len(flat.getcolors(maxcolors=1_000_000) or []) > 10


def test_sample_table_shows_control_characters_as_text(uninterrupted: Path) -> None:
    from environment import judge
    from rollouts import RolloutRecord

    bad = RolloutRecord("red circle", 2, 4, "\x1b[2J<tool_call>\n[red]", judge("x", 2, 4), 0.0, -0.5)
    table = sample_table([bad], step=7)
    assert "step 7" in table and r"\x1b[2J<tool_call>\n[red]" in table and "unparsable: no_call" in table
    assert "2 (red circle)" in table and "-0.50" in table
