"""A run takes its folder once its model is loaded: made, emptied or refused by what is in it at that moment."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flags import UsageError
from image_check import RunData
from options import parse_options, resolve_options
from run_lock import RunLock
from run_setup import take_output_dir
from tests.helpers import toy_dataset

OTHER_RUN = json.dumps({"options": {"seed": 7}})


def missing(folder: Path) -> None:
    """Leaves it as it is."""


def empty(folder: Path) -> None:
    folder.mkdir()


def killed_as_it_began(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json.unfinished").write_text('{"opt')


def run_of_before(folder: Path) -> None:
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "config.json").write_text(OTHER_RUN)
    (folder / "metrics.jsonl").write_text("{}\n")


def files_of_somebody(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("chapter 1")


def take(folder: Path, *flags: str) -> None:
    """Takes the folder for a run whose checks are over and whose model is loaded."""
    options, _ = resolve_options(parse_options(["--output_dir", str(folder), *flags]), has_bf16_gpu=False)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(world_size=1, process_index=0), accelerator=SimpleNamespace(wait_for_everyone=lambda: None)
    )
    with RunLock(folder) as lock:
        take_output_dir(options, trainer, RunData(toy_dataset().env, "digest", ()), lock)


@pytest.mark.parametrize("before", [missing, empty, killed_as_it_began, run_of_before])
def test_overwrite_leaves_the_new_runs_config_alone(before: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before(folder)
    take(folder, "--overwrite", "--seed", "3")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text())["options"]["seed"] == 3


@pytest.mark.parametrize(
    ("before", "flags", "words"),
    [
        (run_of_before, [], "is not empty; pass --resume"),
        (files_of_somebody, [], "is not empty; pass --resume"),
        (files_of_somebody, ["--overwrite"], "holds no Fleet run, so nothing in it is deleted"),
    ],
)
def test_what_came_while_the_model_loaded_is_kept_and_refused(
    before: Callable[[Path], None], flags: list[str], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    before(folder)
    files = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=words):
        take(folder, *flags)
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == files
