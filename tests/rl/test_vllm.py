"""A real vLLM on the CPU sees the prompt, the pictures and the weights that the trainer scores with.

Run by `make test-vllm`, which lays vLLM beside the environment. What only a GPU has (weights sent by NCCL, tensor
parallelism) is not shown here.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.run_folder import read_jsonl
from tests.documented import all_documented_commands
from tests.helpers import REPOSITORY, toy_processor
from tests.processes import free_port
from tests.vllm_model import build
from tests.vllm_on_cpu import OVERLAY, VARIABLES

pytestmark = pytest.mark.vllm

# four pictures in all, so that each step shows those of the last again
PICTURES = ("red_circle", "blue_square", "cyan_ring", "pink_flower")
# of a vocabulary of 8192, two tokens are banned: what is left is that much likelier, and float32 agrees to 1e-5
ROUNDING = 2e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def flags(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pictures = tmp_path_factory.mktemp("pictures")
    for name in PICTURES:
        shutil.copy(REPOSITORY / "toy_images" / f"{name}.png", pictures)
    # the model says nothing, so rewards must differ for another reason, or it would not train
    return ["--data_root", str(pictures), "--model_id", str(model), "--use_vllm", "true", "--learning_rate", "1e-2",
            "--per_device_batch_size", "2", "--max_completion_length", "16", "--image_max_pixels", "3136",
            "--gradient_checkpointing", "false", "--report_to", "none", "--sample_steps", "0",
            "--reward", "tests/vllm_on_cpu.py:reward_by_length"]  # fmt: skip


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    assert (OVERLAY / "vllm").is_dir(), f"{OVERLAY} holds no vLLM; run make test-vllm"
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=os.environ | VARIABLES, capture_output=True, text=True
    )


def figures_of(output_dir: Path, name: str) -> list[float]:
    return [line[f"vllm/{name}"] for line in read_jsonl(output_dir / "metrics.jsonl")]


def gaps_of(output_dir: Path) -> list[float]:
    return figures_of(output_dir, "logprob_gap")


def train_colocated(folder: Path, *flags: str) -> dict[str, Any]:
    """What tests/vllm_colocate.py found; `gaps` of its steps."""
    done = run("tests/vllm_colocate.py", str(folder / "results.json"), *flags, "--output_dir", str(folder / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "results.json").read_text())
    assert found["exit_code"] == 0, done.stderr[-3000:]
    return found | {"gaps": gaps_of(folder / "run"), "folder": folder / "run"}


@pytest.fixture(scope="module")
def colocated(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_colocated(tmp_path_factory.mktemp("colocated"), *flags, "--train_steps", "3")


def test_a_colocated_vllm_agrees_at_every_step(colocated: dict[str, Any]) -> None:
    # all weights train, the vision tower's too, at a rate that moves them far
    assert len(colocated["gaps"]) == 3 and max(colocated["gaps"]) < ROUNDING


def require_weights_of_one(folder: Path, rounding: float) -> None:
    assert figures_of(folder, "correction_mean") == pytest.approx([1.0] * 3, abs=rounding)
    assert figures_of(folder, "correction_truncated") == [0.0] * 3
    assert min(figures_of(folder, "effective_samples")) > 1 - rounding


def test_its_rollouts_have_weights_of_one(colocated: dict[str, Any]) -> None:
    require_weights_of_one(colocated["folder"], 1e-4)


def test_vllm_has_room_for_what_the_run_needs(colocated: dict[str, Any]) -> None:
    # half as much again as 193 to 195 tokens of a prompt, and 16 of a completion; the model has 4096 positions
    assert 193 * 3 // 2 + 16 <= colocated["room"] <= 195 * 3 // 2 + 16


@pytest.mark.parametrize("shared_prefix", ["true", pytest.param("false", marks=pytest.mark.exhaustive)])
def test_weights_are_one_under_a_temperature_and_a_nucleus(
    shared_prefix: str, flags: list[str], tmp_path: Path
) -> None:
    """The trainer's whole vocabulary against vLLM's nucleus would give each of 16 tokens 0.9: weights of 0.19."""
    # no rollout says anything, so every group is drawn anew once
    found = train_colocated(tmp_path, *flags, "--train_steps", "3", "--temperature", "0.7", "--top_p", "0.9",
                            "--dynamic_sampling", "1", "--shared_prefix", shared_prefix)  # fmt: skip
    require_weights_of_one(found["folder"], 1e-4)
    assert max(found["gaps"]) < 1e-5
    assert [line["dynamic_sampling/groups_per_kept"] for line in read_jsonl(tmp_path / "run/metrics.jsonl")] == [
        2.0
    ] * 3


def test_a_vllm_that_chooses_its_dtype_is_refused_beside_a_trainer_in_float32(flags: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from tests.vllm_on_cpu import adapt_colocated, run_training; adapt_colocated(dtype='auto'); "
        "sys.exit(run_training(sys.argv[1:]))"
    )
    done = run("-c", code, *flags, "--train_steps", "1", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "vLLM computes in bfloat16 beside a trainer in float32, and TRL 1.16 cannot tell it otherwise" in line
    assert "Traceback" not in done.stderr


def test_expanded_placeholders_would_be_expanded_again_and_are_found(colocated: dict[str, Any]) -> None:
    assert "205 tokens for 193, with [16, 4, 4, 4] tokens an image for [4, 4, 4, 4]" in colocated["guard"]
    assert "They part at token 125: " in colocated["guard"]


def test_features_of_earlier_weights_would_be_used_again_and_are_forgotten(colocated: dict[str, Any]) -> None:
    assert colocated["fresh_gap"] < ROUNDING
    assert colocated["stale_gap"] > 20 * colocated["fresh_gap"]


def test_media_tokens_are_never_drawn(colocated: dict[str, Any]) -> None:
    assert colocated["media_drawn"]["banned"] == 0 < colocated["media_drawn"]["pulled"]


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The port of a real `vllm serve`, started by the README's command with what a CPU and a small model ask."""
    assert (OVERLAY / "vllm").is_dir(), f"{OVERLAY} holds no vLLM; run make test-vllm"
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    (documented,) = [line for line in all_documented_commands() if "vllm serve" in line]
    developing, vllm, serve, _, *flags = shlex.split(documented)
    assert (developing, vllm, serve) == ("VLLM_SERVER_DEV_MODE=1", "vllm", "serve")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", serve, str(model), *flags, "--host", "127.0.0.1",
               "--port", port, "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]  # fmt: skip
    environment = os.environ | VARIABLES | {"VLLM_SERVER_DEV_MODE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while not is_up(port):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        process.wait()


def is_up(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def train_on(port: str, flags: list[str], output_dir: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    return run("tests/vllm_on_cpu.py", *flags, "--vllm_mode", "server", "--vllm_server_port", port,
               "--output_dir", str(output_dir), *more)  # fmt: skip


def test_a_server_agrees_until_weights_are_kept_from_it(server: str, flags: list[str], tmp_path: Path) -> None:
    done = train_on(server, flags, tmp_path / "run", "--train_steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = gaps_of(tmp_path / "run")
    # weights go to a server by NCCL alone, so here it keeps the first ones, which shows
    assert first < ROUNDING and second > 20 * ROUNDING


@pytest.mark.exhaustive
def test_a_server_of_another_model_is_refused(server: str, flags: list[str], tmp_path: Path) -> None:
    other = build(tmp_path / "other", seed=1)
    done = train_on(server, flags, tmp_path / "run", "--train_steps", "1", "--model_id", str(other))
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "vLLM and the trainer disagree on the first generation's tokens" in line
    assert "Traceback" not in done.stderr


def test_a_server_draws_no_media_tokens(server: str, model: Path) -> None:
    tokenizer = toy_processor().tokenizer
    media = {tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}

    def num_drawn(bias: float) -> int:
        body = {"model": str(model), "prompt": [5, 6, 7, 8], "max_tokens": 16, "n": 16, "temperature": 1.0, "seed": 0,
                "ignore_eos": True, "return_token_ids": True,
                "logit_bias": {str(token): bias for token in media}}  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            choices = json.load(answer)["choices"]
        return sum(token in media for choice in choices for token in choice["token_ids"])

    assert num_drawn(-100.0) == 0 < num_drawn(9.0)
