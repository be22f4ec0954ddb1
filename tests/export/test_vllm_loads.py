"""A real vLLM on the CPU opens an export with its own loader, and gives its tokens transformers' log-probabilities."""

import json
from pathlib import Path

import pytest
import torch

import export
import training
from tests.export.oracle import logprobs_T
from tests.rl.test_vllm import run
from tests.vllm_model import build

pytestmark = pytest.mark.vllm


def test_vllm_opens_an_export(tmp_path: Path) -> None:
    base = build(tmp_path / "base")
    training.main(["--model_id", str(base), "--use_lora", "--learning_rate", "1e-2", "--train_steps", "1",
                   "--per_device_batch_size", "2", "--image_max_pixels", "3136", "--max_completion_length", "16",
                   "--gradient_checkpointing", "false", "--sample_steps", "0", "--report_to", "none",
                   "--reward", "tests/vllm_on_cpu.py:reward_by_length",
                   "--output_dir", str(tmp_path / "run")])  # fmt: skip
    export.main([str(tmp_path / "run")])
    done = run("tests/vllm_export.py", str(tmp_path / "run" / "export"), str(tmp_path / "logprobs.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.tensor(json.loads((tmp_path / "logprobs.json").read_text()), dtype=torch.double)
    torch.testing.assert_close(found, logprobs_T(tmp_path / "run" / "export"), rtol=0, atol=1e-3)
    assert (found - logprobs_T(base)).abs().max() > 0.01, "the run changed nothing"
