"""The benchmark of whole steps runs as written on a small model, parity holds, and its ideal is what PyTorch counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ideal, step_time
from tests import HANG_S
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.slow


def run_step_time(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "benchmarks/step_time.py", "--model_size", "2m", "--image_side_px", "56", *flags],
        cwd=REPOSITORY, text=True, capture_output=True, timeout=HANG_S,
    )  # fmt: skip


@pytest.mark.exhaustive  # make documented runs the same benchmark
def test_steps_are_compared_side_by_side_and_written_down(tmp_path: Path) -> None:
    path = tmp_path / "results" / "step.json"
    flags = ["--num_steps", "2", "--num_rollouts", "4", "--num_episodes", "2", "--beta", "0.05", "--json", str(path)]
    done = run_step_time(*flags, "--completions", "random")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    assert result["parity"]["max_logprob_abs"] <= 1e-5
    assert result["parity"]["max_grad_rel"] <= 1e-4
    assert result["parity"]["num_gradients"] > 60
    for phase in ("step", "train", "generate", "score"):
        row = result[phase]
        assert 0 < row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"], phase
    assert result["step"]["fleet_s_median"] >= result["train"]["fleet_s_median"] > 0
    assert result["step"]["ideal_ratio"] > 1 and result["train"]["ideal_ratio"] > 1
    # every rollout leaves the drafts at once, and goes on for all of its 30 tokens
    assert result["passes"]["generation_forwards"] == result["passes"]["stock_generation_forwards"] == 30
    assert result["memory"]["fleet_bytes"] > 0 and result["memory"]["stock_bytes"] > 0
    # 2 prompts of 4 images of 4 tokens; stock computes them 4 times, in one pass more
    amounts = result["amounts"]
    assert amounts["stock"]["patches"] == 4 * 4 * 8 * 16 and amounts["fleet"]["patches"] == 3 * 8 * 16
    assert amounts["stock"]["tokens"] > 3 * amounts["fleet"]["tokens"]
    assert {"command", "device", "versions", "settings", "rollouts_per_s"} <= result.keys()
    assert "parity: log-probabilities within" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image_side_px", "100"], "--image_side_px 100 is not a multiple of 28"),
        (["--num_rollouts", "1"], "at least 2 rollouts"),
        (["--num_images", "13", "--num_pictures", "12"], "up to --num_pictures"),
        (["--flatness", "64,4"], "wanted two numbers from 2 up, as 4,64"),
        (["--json", "benchmarks"], "--json benchmarks is a folder; name a file in it"),
        (["--json", "README.md/step.json"], "README.md is a file, not a folder"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["step_time.py", "--model_size", "2m", "--image_side_px", "56", *flags])
    with pytest.raises(SystemExit, match="2"):
        step_time.main()
    assert words in capsys.readouterr().err


def test_a_row_that_the_table_does_not_have_is_refused() -> None:
    command = [sys.executable, "benchmarks/step_time_table.py", "--only", "g64"]
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=HANG_S)
    assert done.returncode == 2 and "invalid choice: 'g64'" in done.stderr


@pytest.mark.parametrize(
    "flags", [pytest.param("--beta 0.05", marks=pytest.mark.exhaustive), "--freeze tower,merger --use_lora"]
)
def test_the_ideal_is_what_pytorch_counts_in_both_trainers_steps(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # eager attention, because PyTorch counts its products; few tokens, because it computes masked pairs too
    few = "--num_rollouts 3 --num_episodes 1 --completions random --completion_tokens 6"
    few += " --image_side_px 56 --num_pictures 4"
    eager = "--attn_implementation eager --stock_attn_implementation eager"
    monkeypatch.setattr(sys, "argv", f"step_time.py {few} {eager} {flags}".split())
    arguments = step_time.parse_arguments()
    counted = []
    with step_time.prepared_folder(arguments) as folder:
        for kind in ("stock", "fleet"):
            trainer = step_time.make_trainer(kind, arguments, folder)
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1
            batch = next(iter(trainer.get_train_dataloader()))
            with FlopCounterMode(display=False) as counter:
                trainer.training_step(trainer.model, batch, 1)
            counted.append(counter.get_total_flops())
        # the first step finds nothing in the cache, if there is one
        has_cache = trainer.vision_cache is not None
        work = ideal.Work(arguments, trainer, encoded_share=1.0 if has_cache else None)
    # with a model of this size LoRA's own products are 8 % of the work
    assert work.step_costs() == pytest.approx(counted, rel=0.1 if "lora" in flags else 0.03)
    assert work.step_ratio() == pytest.approx(counted[0] / counted[1], rel=0.03)


def test_calls_are_sampled_and_trained_on_in_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    flags = ["--num_rollouts", "4", "--num_images", "3", "--measure_memory", "false", "--flatness", "2,6"]
    done = run_step_time(*flags, "--two_passes", "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    assert result["passes"]["generation_forwards"] == 1 < result["passes"]["stock_generation_forwards"]
    # three layers of vision, one image of one window each
    assert result["passes"]["vision_attention_calls"] == 3 < result["passes"]["stock_vision_attention_calls"]
    assert result["passes"]["one_pass_share"] == 1.0
    assert result["parity"]["max_logprob_abs"] <= 1e-5 and result["parity"]["max_grad_rel"] <= 1e-4
    assert "ideal_ratio" not in result["step"] and result["flatness"] > 0
    assert result["two_passes"]["ratio_median"] > 0
    assert "Fleet's step at 6 rollouts takes" in done.stdout and "in two passes" in done.stdout


def test_the_gpu_check_runs_on_small_sizes_too(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    # the toy's is run by documented.py
    sections = ["parity", "steps_8", "steps_64", "lora_7b", "zero3", "resume"]
    sizes = ["--model_size", "2m", "--image_side_px", "56", "--dtype", "float32"]
    command = [sys.executable, "benchmarks/gpu_check.py", *sizes, "--sections", *sections, "--json", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    # in float32 the noise floor and the tree are both rounding
    assert 0 < result["parity"]["tree"]["logprob_max"] <= 1e-5
    assert result["parity"]["tree"]["gradient_max"] <= 1e-4
    assert result["steps_8"]["without checkpointing"]["one_pass"] == 1.0
    for beside in ("beside stock", "beside stock with our vision"):
        assert result["steps_8"][beside]["parity"]["max_grad_rel"] <= 1e-4
    assert result["steps_8"]["beside stock with our vision"]["passes"]["stock_vision_attention_calls"] == 3
    assert result["steps_64"]["fleet"]["rollouts_per_s"] > 0
    assert result["steps_64"]["stock, scaled from 8 rollouts and not measured"]["step_s"] > 0
    assert result["lora_7b"]["rollouts_per_s"] > 0 and 0 <= result["lora_7b"]["waiting_share"] < 1
    assert result["zero3"]["steps"] == 3 and result["zero3"]["has_weights"]
    assert result["resume"]["is_equal_bit_for_bit"] is True
    assert "noise_floor" in done.stdout and "share_of_peak" in done.stdout
