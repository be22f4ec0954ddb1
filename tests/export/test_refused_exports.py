"""What cannot be exported is said in a line before a weight loads; what fails leaves no half of a folder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

import export
from fleet.errors import RunStopped, UsageError
from tests import HANG_S
from tests.export.oracle import plain_model
from tests.helpers import REPOSITORY, toy_path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "adapter"
    get_peft_model(plain_model(toy_path()), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    """The folder of a run, as far as export.py looks into it."""
    folder = tmp_path / "run"
    shutil.copytree(adapter, folder / "final")
    (folder / "config.json").write_text(json.dumps({"run_id": "1", "options": {"model_id": "toy", "train_steps": 1}}))
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


BROKEN: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no final": (lambda run: shutil.rmtree(run / "final"), [], "has no final/; train on until it saves"),
    "no such checkpoint": (
        lambda run: (run / "checkpoint-7").mkdir(),
        ["--checkpoint", "checkpoint-5"],
        "has no checkpoint-5; pass --checkpoint with one of checkpoint-7",
    ),
    "no best": (lambda run: None, ["--checkpoint", "best"], "checkpoint=best, but no checkpoint of run"),
    "a word": (lambda run: None, ["--checkpoint", "newest"], "checkpoint=newest, but wanted final, best or checkpoint"),
    "cut adapter": (lambda run: cut(run / "final" / "adapter_model.safetensors"), [], "bytes, but by its header"),
    "no adapter weights": (
        lambda run: (run / "final" / "adapter_model.safetensors").unlink(),
        [],
        "has no adapter_model.safetensors",
    ),
    "base gone": (
        lambda run: edit_json(run / "final" / "adapter_config.json", base_model_name_or_path="/gone/base"),
        [],
        "is an adapter whose base_model_name_or_path=/gone/base is no folder",
    ),
    "other rank": (lambda run: edit_json(run / "final" / "adapter_config.json", r=3), [], "have other shapes"),
    "output is a file": (lambda run: (run / "export").write_text("mine"), [], "is a file; pass a folder as --output"),
    "output in use": (
        lambda run: (run / "export" / "sub").mkdir(parents=True),
        [],
        "is not empty; pass --overwrite to replace an earlier export",
    ),
    "output of somebody else": (
        lambda run: (run / "export" / "sub").mkdir(parents=True),
        ["--overwrite"],
        "is no earlier export, so nothing in it is deleted",
    ),
}


@pytest.mark.parametrize(("change", "flags", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_what_cannot_be_exported_is_said_before_a_weight_loads(
    change: Callable[[Path], object], flags: list[str], words: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(run)
    monkeypatch.setattr("fleet.run.build.export.open_trained", lambda *args, **kw: pytest.fail("a weight was loaded"))
    with pytest.raises(UsageError) as refusal:
        export.main([str(run), *flags])
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (run / "export" / "README.md").exists() and not (run / "export.unfinished").exists()


PLAIN = {
    "nothing": ([], "run is missing; pass the folder of a run"),
    "no folder": (["nowhere"], "run=nowhere is no folder; pass the folder of a run"),
    "a file": (["README.md"], "run=README.md is a file; pass the folder"),
    "unknown flag": (["x", "--chekpoint", "best"], "unknown flag --chekpoint, did you mean --checkpoint?"),
    "a dtype of its own": (["x", "--dtype", "float16"], "invalid choice: 'float16'"),
    "private alone": (["x", "--private", "false"], "private does nothing without push_to_hub"),
    "not a model": (["docs"], "model folder docs has no config.json"),
}


@pytest.mark.parametrize(("argv", "words"), PLAIN.values(), ids=PLAIN.keys())
def test_bad_words_are_refused(argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UsageError) as refusal:
        export.main(argv)
    assert words in str(refusal.value)


def test_what_is_read_is_not_overwritten(run: Path, adapter: Path) -> None:
    with pytest.raises(UsageError, match="holds .*final, which is exported; pass another --output"):
        export.main([str(run), "--output", str(run / "final"), "--overwrite"])
    with pytest.raises(UsageError, match="which is exported; pass another --output"):
        export.main([str(adapter), "--output", str(adapter.parent), "--overwrite"])


@pytest.mark.parametrize(
    ("variables", "name", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "me/model", "push_to_hub=me/model, but HF_HUB_OFFLINE says that there is no hub"),
        ({"HF_TOKEN": "hf_x"}, "me/model", "push_to_hub=me/model, but the hub does not let you in ("),
        ({}, "model", "push_to_hub=model, but wanted OWNER/NAME"),
        ({}, "me/--", "push_to_hub=me/-- is no name on the hub"),
    ],
    ids=["told so", "no connection", "no owner", "no name"],
)
def test_the_hub_is_asked_before_anything_is_written(
    variables: dict[str, str], name: str, words: str, run: Path
) -> None:
    # huggingface_hub reads its variables as it is imported; nothing listens at this address
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "export.py", str(run), "--push_to_hub", name],
        cwd=REPOSITORY,
        env=os.environ | nowhere | variables,
        text=True,
        capture_output=True,
        timeout=HANG_S,
    )
    assert done.returncode == 2 and not (run / "export").exists()
    assert done.stderr.startswith(f"error: {words}") and done.stderr.count("\n") == 1, done.stderr


def test_a_second_export_replaces_the_first_and_a_failed_one_does_not(run: Path) -> None:
    # what a kill has left
    (run / "export.unfinished" / "export").mkdir(parents=True)
    export.main([str(run)])
    assert not (run / "export.unfinished").exists()
    (run / "export" / "old").write_text("")
    with pytest.raises(UsageError, match="is not empty; pass --overwrite"):
        export.main([str(run)])
    weights = load_file(run / "final" / "adapter_model.safetensors")
    broken = {name: weight * float("nan") for name, weight in weights.items()}
    save_file(broken, run / "final" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="has weights that are not finite numbers, .*lora"):
        export.main([str(run), "--overwrite"])
    assert (run / "export" / "old").exists() and not (run / "export.unfinished").exists()
    save_file(weights, run / "final" / "adapter_model.safetensors", {"format": "pt"})
    export.main([str(run), "--overwrite"])
    assert not (run / "export" / "old").exists() and (run / "export" / "README.md").exists()


def test_an_adapter_that_a_merge_would_change_is_not_exported(tmp_path: Path) -> None:
    base = plain_model(toy_path())
    config = base.config
    config.tie_word_embeddings = True
    tied = Qwen2_5_VLForConditionalGeneration(config)
    tied.load_state_dict(base.state_dict(), strict=False)
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    for path in Path(toy_path()).iterdir():
        if not (tmp_path / "tied" / path.name).exists():
            shutil.copy(path, tmp_path / "tied")
    adapted = get_peft_model(plain_model(tmp_path / "tied"), LoraConfig(r=2, target_modules=["lm_head"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RunStopped, match="the exported weights are not what was trained: .*of a tied lm_head"):
        export.main([str(tmp_path / "adapter")])
    assert not (tmp_path / "adapter" / "export").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(run: Path) -> None:
    # a limit on the size of files stands for a disk that is full in the middle of the weights
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); import export; "
        "from fleet.command import command_line; sys.exit(command_line.run(export.main))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], cwd=REPOSITORY, text=True, capture_output=True, timeout=HANG_S
    )
    assert done.returncode == 1, done.stderr
    assert f"error: the export could not be written to {run / 'export'} (" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "final"]
