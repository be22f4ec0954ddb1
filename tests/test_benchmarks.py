"""The benchmark of whole steps runs as written, on a small model: what it reports is there, and parity holds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY

pytestmark = pytest.mark.slow


def step_time(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "benchmarks/step_time.py", "--model_size", "2m", "--image_side_px", "56", *flags],
        cwd=REPOSITORY, text=True, capture_output=True, timeout=300,
    )  # fmt: skip


def test_steps_are_compared_side_by_side_and_written_down(tmp_path: Path) -> None:
    path = tmp_path / "results" / "step.json"
    flags = ["--num_steps", "2", "--num_rollouts", "4", "--num_episodes", "2", "--beta", "0.05", "--json", str(path)]
    done = step_time(*flags)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    assert result["parity"]["max_logprob_abs"] <= 1e-5
    assert result["parity"]["max_grad_rel"] <= 1e-4
    assert result["parity"]["num_gradients"] > 60
    for phase in ("step", "train", "generate", "score"):
        row = result[phase]
        assert 0 < row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"], phase
    assert result["step"]["fleet_s_median"] >= result["train"]["fleet_s_median"] > 0
    assert result["ideal"]["ratio"] > 1 and result["train"]["ideal_ratio"] > 1
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
    ],
)
def test_a_setting_that_cannot_be_is_refused(flags: list[str], words: str) -> None:
    done = step_time(*flags)
    assert done.returncode == 2 and words in done.stderr
