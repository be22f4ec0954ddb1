"""A disk that is full, read-only or gone: the run goes on, or stops with the reason and its last checkpoint whole."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.rl.checkpoints import find_damage, list_checkpoints
from fleet.run_folder import LineFile, read_jsonl
from tests.helpers import REPOSITORY
from tests.processes import run_ranks, start_ranks
from tests.test_interruptions import num_steps, wait_until
from tests.test_resume import QUICK


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    lines = LineFile(path)
    lines.append([{"step": 1}])
    lines.append([{"step": 2}])
    assert [message for message in caplog.messages if "metrics.jsonl cannot be written" in message] == caplog.messages
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]
    path.unlink()
    lines.append([{"step": 3}])
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_line_that_the_disk_takes_half_of_leaves_no_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    # a limit on the size of files stands for a disk that is full in the middle of a line
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from fleet.run_folder import LineFile
lines = LineFile(Path({str(path)!r}))
lines.append([{{"step": 1}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
lines.append([{{"step": 2, "much": "x" * 9000}}])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.append([{{"step": 3}}])
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3]


def test_lines_survive_a_folder_that_goes_away(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "run" / "metrics.jsonl")
    lines.append([{"step": 1}])
    shutil.rmtree(tmp_path / "run")
    lines.append([{"step": 2}])
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [{"step": 2}]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB, room for two checkpoints of the toy's and half a third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root and the right to mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_the_reason_and_it_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--train_steps"]
    (rank,) = start_ranks(tmp_path, [*arguments, "4"])
    assert rank.wait() == 1
    (said,) = [line for line in rank.output.splitlines() if line.startswith("error: ")]
    assert said.startswith("error: process 0 could not save ") and "the checkpoints before it are whole" in said
    assert "make room (0 MiB free there)" in said or "make room (1 MiB free there)" in said
    assert "pass --resume" in said and "Traceback" not in rank.output
    names = [path.name for path in list_checkpoints(run)]
    assert names == ["checkpoint-2", "checkpoint-1"]
    assert [find_damage(path) for path in list_checkpoints(run)] == [None, None]
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
        while True:
            filler.write(bytes(4096))
    (rank,) = start_ranks(tmp_path, [*arguments, "4", "--resume"])
    assert rank.wait() == 2
    assert f"error: output_dir={run} cannot be written to (No space left on device); make it" in rank.output
    assert [find_damage(path) for path in list_checkpoints(run)] == [None, None]
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    run_ranks(tmp_path, [*arguments, "4", "--resume"])
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_disk_that_becomes_read_only_stops_the_run_with_the_reason(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=900m", str(small_disk)], check=True)
    run = small_disk / "run"
    # nothing keeps a file open for writing between two steps, so that the disk can be made read-only
    (rank,) = start_ranks(tmp_path, [*QUICK, "--output_dir", str(run), "--train_steps", "999"])
    wait_until(lambda: num_steps(run) >= 2, [rank])
    while rank.process.is_alive():
        if subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], capture_output=True).returncode == 0:
            break
    assert rank.wait() == 1
    assert "error: process 0 could not save" in rank.output and "Read-only file system" in rank.output
    whole = [path for path in list_checkpoints(run) if find_damage(path) is None]
    assert whole == list_checkpoints(run) and len(whole) >= 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_whose_folder_vanishes_goes_on_and_can_be_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--save_steps", "6", "--train_steps"]
    (rank,) = start_ranks(tmp_path, [*arguments, "8"])
    wait_until(lambda: num_steps(run) == 2, [rank])
    os.rename(run, tmp_path / "gone")
    assert rank.wait() == 0, rank.output[-3000:]
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-8", "checkpoint-6"]
    assert [find_damage(path) for path in list_checkpoints(run)] == [None, None]
    assert json.loads((run / "config.json").read_text())["options"]["train_steps"] == 8
    run_ranks(tmp_path, [*arguments, "9", "--resume"])
