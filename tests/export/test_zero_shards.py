"""Shards that two processes under ZeRO-3 left become a model offline, the one that gathering them gives."""

import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2_5_VLForConditionalGeneration

import evaluate
import export
from fleet.errors import UsageError
from tests.export.oracle import HUB_NAMES, logprobs_T, plain_model
from tests.helpers import toy_path, toy_processor
from tests.processes import ZERO3_CONFIG, run_ranks

pytestmark = pytest.mark.slow

FLAGS = ["--fixed_correct_index", "none", "--per_device_batch_size", "2", "--sample_steps", "0", "--train_steps", "2",
         "--save_steps", "1", "--learning_rate", "1e-3", "--report_to", "none",
         "--image_max_pixels", "3136"]  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy with one weight for embeddings and output, as the hub's 3B has it."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    toy = plain_model(toy_path())
    toy.config.tie_word_embeddings = True
    model = Qwen2_5_VLForConditionalGeneration(toy.config)
    model.load_state_dict(toy.state_dict(), strict=False)
    model.tie_weights()
    model.generation_config = toy.generation_config
    model.save_pretrained(folder)
    toy_processor().save_pretrained(folder)
    return folder


def trained(folder: Path, *flags: str, gathers: bool) -> Path:
    """A run of two processes, whose saves gather whole weights or leave the shards alone."""
    config = folder / "zero3.yaml"
    text = ZERO3_CONFIG.read_text()
    assert "zero3_save_16bit_model: true" in text
    config.write_text(text.replace("zero3_save_16bit_model: true", f"zero3_save_16bit_model: {str(gathers).lower()}"))
    run = folder / ("gathered" if gathers else "shards")
    run_ranks(folder / f"logs-{run.name}", [*FLAGS, *flags, "--output_dir", str(run)], 2, zero3=True, config=config)
    return run


@pytest.fixture(scope="module", params=[False, True], ids=["all weights train", "frozen vision, tied embeddings"])
def runs(request: pytest.FixtureRequest, tied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--model_id", str(tied), "--freeze", "tower,merger"] if request.param else ["--model_id", toy_path()]
    return trained(folder, *flags, gathers=True), trained(folder, *flags, gathers=False)


def test_shards_become_the_model_that_gathering_gives(runs: tuple[Path, Path], tmp_path: Path) -> None:
    gathered, shards = runs
    assert not list((shards / "final").glob("*.safetensors"))
    export.main([str(shards)])
    assert logprobs_T(shards / "export").equal(logprobs_T(gathered / "final"))
    export.main([str(shards), "--checkpoint", "checkpoint-1", "--output", str(tmp_path / "first")])
    assert logprobs_T(tmp_path / "first").equal(logprobs_T(gathered / "checkpoint-1"))
    with safe_open(shards / "export" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    with safe_open(gathered / "final" / "model.safetensors", framework="pt") as file:
        assert names == set(file.keys())
    assert [name for name in names if not HUB_NAMES.fullmatch(name)] == []
    evaluate.main(["--model_id", str(shards / "export"), "--eval_episodes", "4", "--num_samples", "0"])
    export.main([str(shards), "--dtype", "bfloat16", "--output", str(tmp_path / "half")])
    rounded, wanted = (
        plain_model(folder, dtype=torch.bfloat16).state_dict() for folder in (tmp_path / "half", gathered / "final")
    )
    assert [name for name in wanted if not rounded[name].equal(wanted[name])] == []


def test_evaluation_says_what_shards_need(runs: tuple[Path, Path]) -> None:
    folder = runs[1] / "final"
    with pytest.raises(UsageError, match=re.escape(f"(python export.py {folder}), and pass that")):
        evaluate.main(["--model_id", str(folder), "--eval_episodes", "4"])


def test_broken_and_foreign_shards_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shards = runs[1]
    final = shards / "final"
    (step,) = final.glob("global_step*")
    path = step / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(UsageError, match=r"cannot be put together \(Expected 2 of .* found 1 files"):
            export.main([str(shards), "--output", str(tmp_path / "out")])
        path.write_bytes(pickle.dumps(torch.save, protocol=2))
        with pytest.raises(UsageError, match="would run code as it is loaded, or cannot be read"):
            export.main([str(shards), "--output", str(tmp_path / "out")])
    finally:
        path.write_bytes(content)
    damaged = shards / "checkpoint-1" / "latest"
    damaged.write_text("global_step9")
    with pytest.raises(UsageError, match="checkpoint-1 is damaged: .*latest"):
        export.main([str(shards), "--checkpoint", "checkpoint-1", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.unfinished"))
