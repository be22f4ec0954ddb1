"""A run takes its folder once its model is loaded: made, emptied or refused by what is in it at that moment."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fleet.command.options import Options, parse_options, resolve_options
from fleet.command.output_dir import make_new_output_dir, require_output_dir
from fleet.errors import UsageError
from fleet.run.output import begin_folder
from fleet.run_folder import LineFile, write_atomically
from fleet.run_lock import RunLock

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
    with RunLock(folder):
        begin_folder(folder, options, {}, json.dumps({"options": asdict(options)}), {}, 0)


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


NOT_REGULAR: dict[str, Callable[[Path], object]] = {
    "a link to nothing": lambda path: path.symlink_to("/scratch-not-mounted/x"),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def options_of(*flags: str) -> Options:
    return parse_options([*flags])


@pytest.mark.parametrize(("kind", "make"), [*NOT_REGULAR.items(), ("a file", Path.touch)])
@pytest.mark.parametrize("name", ["runs", "mine"])
def test_what_is_no_folder_takes_no_run_named_or_not(
    name: str, kind: str, make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    options = options_of() if name == "runs" else options_of("--output_dir", str(tmp_path / name))
    with pytest.raises(UsageError, match=f"output_dir.*{name},?.* is {kind}; pass a folder as --output_dir"):
        require_output_dir(options)
    if name == "runs":
        with pytest.raises(UsageError, match="output_dir: runs/.* cannot be made .*; pass --output_dir with a folder"):
            make_new_output_dir("toy")


def test_a_folder_below_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scratch").symlink_to("/scratch-not-mounted")
    with pytest.raises(UsageError, match=f"lies in {tmp_path}/scratch, a link to nothing; mount it, or pass another"):
        require_output_dir(options_of("--output_dir", str(tmp_path / "scratch" / "runs" / "a")))


@pytest.mark.parametrize("name", ["x" * 300, "circle", "circle/run", "mine\0"])
def test_a_name_that_no_folder_can_have_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UsageError, match=r"output_dir=.* is not a valid folder \(.*\); pass another"):
        require_output_dir(replace(options_of(), output_dir=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-3B-Instruct"),
        ("models/../models/a b;rm\n*'\"", "a-b-rm-"),
        ("models/größe", "gr-e"),
        (".", "here"),
        ("models/" + "x" * 250, "x" * 80),
        ("/", ""),
    ],
)
def test_a_new_folder_is_named_after_any_model(
    model_id: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folders = [make_new_output_dir(model_id) for _ in range(2)]
    assert folders[0].is_dir() and folders[1].is_dir() and folders[0] != folders[1]
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{re.escape(name)}(-2)?", folders[0].name)


@pytest.mark.parametrize(("kind", "make"), [*NOT_REGULAR.items(), ("a folder", Path.mkdir), ("a file", Path.touch)])
@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "curve.png", "report.html", "final", "unfinished",
     "thumbnails", "tensorboard"],
)  # fmt: skip
def test_a_resume_names_what_is_not_what_its_name_says(
    name: str, kind: str, make: Callable[[Path], object], tmp_path: Path
) -> None:
    run_of_before(tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    make(path)
    options = options_of("--output_dir", str(tmp_path / "run"), "--resume")
    wanted = "a file" if "." in name else "a folder"
    if kind == wanted:
        require_output_dir(options)
        return
    with pytest.raises(UsageError, match=f"resume: {path} is {kind}, wanted {wanted}; move it away"):
        require_output_dir(options)


def test_a_pipe_that_comes_during_the_run_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    LineFile(tmp_path / "metrics.jsonl").append([{"step": 1}])
    assert "metrics.jsonl cannot be written" in caplog.text
    os.mkfifo(tmp_path / "config.json.unfinished")
    write_atomically(tmp_path / "config.json", "{}")
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"No such file or directory: '{tmp_path}/gone/config.json'"):
        write_atomically(tmp_path / "gone" / "config.json", "{}")
