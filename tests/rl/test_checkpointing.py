"""A checkpoint is whole or it is passed over: every kind of damage, every moment of a commit, and what is deleted."""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import RunStopped, UsageError
from fleet.rl.checkpoints import (
    CheckpointFolder,
    ProcessPlace,
    WhyForeign,
    choose_checkpoint,
    find_damage,
    list_checkpoints,
)

FILES = {
    "model.safetensors": b"weights" * 1000,
    "optimizer.pt": b"momenta" * 2000,
    "rng_state.pth": b"randomness",
    "trainer_state.json": b'{"global_step": 1}',
    "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"a shard" * 500,
}
ALONE = ProcessPlace()


def never_foreign(checkpoint: Path) -> None: ...


def folder_of(
    run: Path, keep: int, place: ProcessPlace = ALONE, why_foreign: WhyForeign = never_foreign
) -> CheckpointFolder:
    return CheckpointFolder(run, place, keep, lambda: None, lambda: None, why_foreign)


def chosen_of(run: Path, place: ProcessPlace = ALONE, why_foreign: WhyForeign = never_foreign) -> Path | None:
    return choose_checkpoint(run, place, why_foreign)


def stage(folder: CheckpointFolder, step: int, content: str = "") -> None:
    for name, data in FILES.items():
        path = folder.staging / f"checkpoint-{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + f"{step}{content}".encode())


def save(run: Path, step: int, keep: int = 9, best: int | None = None) -> Path:
    folder = folder_of(run, keep)
    folder.begin()
    stage(folder, step)
    folder.commit(step, best)
    folder.wait()
    return run / f"checkpoint-{step}"


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in list_checkpoints(run)]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_committed_checkpoint_is_whole_and_says_what_it_holds(tmp_path):
    checkpoint = save(tmp_path, 7)
    assert find_damage(checkpoint) is None
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert (manifest["step"], manifest["num_processes"]) == (7, 1)
    assert manifest["files"] == {
        name: {"size": len(data) + 1, "sha256": hashlib.sha256(data + b"7").hexdigest()} for name, data in FILES.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_from_manifest(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["files"]["optimizer.pt"]
    path.write_text(json.dumps(manifest))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda at: (at / "model.safetensors").unlink(), "model.safetensors is missing"),
    "optimizer missing": (lambda at: (at / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "trainer state missing": (lambda at: (at / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "shard missing": (lambda at: shutil.rmtree(at / "global_step1"), "global_step1/zero_pp_rank_0_mp_rank_00_optim"),
    "manifest missing": (lambda at: (at / "manifest.json").unlink(), "it has no manifest.json"),
    "truncated": (lambda at: os.truncate(at / "optimizer.pt", 100), "optimizer.pt has 100 bytes instead of 14,002"),
    "file emptied": (lambda at: os.truncate(at / "rng_state.pth", 0), "rng_state.pth has 0 bytes instead of 12"),
    "one bit flipped": (lambda at: flip_bit(at / "model.safetensors"), "the content of model.safetensors is not what"),
    "one bit of a shard": (
        lambda at: flip_bit(at / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "the content of global_step1/zero_pp_rank_0",
    ),
    "folder emptied": (lambda at: empty(at), "it has no manifest.json"),
    "left-over temporary": (
        lambda at: (at / "optimizer.pt.tmp").touch(),
        "its manifest does not list optimizer.pt.tmp",
    ),
    "planted file": (lambda at: (at / "pytorch_model.bin").touch(), "its manifest does not list pytorch_model.bin"),
    "manifest cut off": (lambda at: os.truncate(at / "manifest.json", 200), "its manifest.json cannot be read"),
    "manifest emptied": (lambda at: os.truncate(at / "manifest.json", 0), "its manifest.json cannot be read"),
    "manifest of another form": (lambda at: (at / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
    "file left out of the manifest": (
        lambda at: remove_from_manifest(at / "manifest.json"),
        "does not list optimizer.pt",
    ),
    "file became a folder": (lambda at: become_folder(at / "rng_state.pth"), "rng_state.pth is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_used(kind, tmp_path, caplog):
    inflict, words = DAMAGES[kind]
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    inflict(bad)
    assert words in str(find_damage(bad))
    with caplog.at_level(logging.WARNING, "fleet"):
        assert chosen_of(tmp_path) == good
    (line,) = caplog.messages
    assert line.startswith("resume: passed over checkpoint-10: ") and words in line
    assert line.endswith(f"; going on from {good}")


def test_hidden_files_are_no_damage(tmp_path):
    checkpoint = save(tmp_path, 5)
    (checkpoint / ".nfs0001").touch()
    assert find_damage(checkpoint) is None


def test_sizes_alone_can_be_compared(tmp_path):
    checkpoint = save(tmp_path, 5)
    flip_bit(checkpoint / "optimizer.pt")
    assert find_damage(checkpoint, reads_content=False) is None
    os.truncate(checkpoint / "optimizer.pt", 5)
    assert find_damage(checkpoint, reads_content=False) is not None


def test_every_file_is_read_by_one_of_several_processes(tmp_path):
    checkpoint = save(tmp_path, 5)
    for name in FILES:
        before = (checkpoint / name).read_bytes()
        flip_bit(checkpoint / name)
        found = [find_damage(checkpoint, ProcessPlace(rank, 3)) for rank in range(3)]
        assert [damage for damage in found if damage] == [f"the content of {name} is not what was saved"]
        (checkpoint / name).write_bytes(before)


def test_damage_that_another_process_finds_counts(tmp_path):
    good, _ = save(tmp_path, 5), save(tmp_path, 10)

    def gather(own: list[Any]) -> list[Any]:
        # the other process finds something in whatever is looked at second, which is checkpoint-10's content
        looks.append(own)
        return own + (["the content of x is not what was saved"] if len(looks) == 2 else own)

    looks: list[list[Any]] = []
    assert chosen_of(tmp_path, ProcessPlace(0, 2, gather)) == good


def test_all_damaged_is_refused_and_none_at_all_begins_anew(tmp_path):
    assert chosen_of(tmp_path) is None
    for step in (5, 10):
        flip_bit(save(tmp_path, step) / "optimizer.pt")
    with pytest.raises(UsageError, match="no checkpoint in .* is whole") as refusal:
        chosen_of(tmp_path)
    assert "checkpoint-10" in str(refusal.value) and "checkpoint-5" in str(refusal.value)


def test_the_newest_is_told_by_its_step_whatever_the_clock_said(tmp_path):
    older, newer = save(tmp_path, 5), save(tmp_path, 10)
    # the clock was set back by a day between the two saves
    for path in (older, *older.iterdir()):
        os.utime(path, (2e9, 2e9))
    for path in (newer, *newer.iterdir()):
        os.utime(path, (1e9, 1e9))
    assert chosen_of(tmp_path) == newer


def test_steps_are_numbers_and_other_names_are_passed_over(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-12.tmp", "checkpoint-"):
        (tmp_path / name).mkdir()
    assert steps_of(tmp_path) == [100, 10, 9]


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


NOT_REGULAR: dict[str, Callable[[Path], object]] = {
    "a link to nothing": lambda path: path.symlink_to("/scratch-not-mounted/x"),
    "a pipe": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize(("kind", "make"), [*NOT_REGULAR.items(), ("a file", Path.touch)])
def test_what_is_no_folder_is_passed_over_by_name_and_gives_way_to_a_save(kind, make, tmp_path, caplog):
    save(tmp_path, 5)
    make(tmp_path / "checkpoint-10")
    assert chosen_of(tmp_path) == tmp_path / "checkpoint-5"
    assert f"passed over checkpoint-10: it is {kind}; going on from {tmp_path / 'checkpoint-5'}" in caplog.text
    assert find_damage(save(tmp_path, 10)) is None


@pytest.mark.parametrize(("kind", "make"), NOT_REGULAR.items())
@pytest.mark.parametrize(
    "name", ["manifest.json", "optimizer.pt", "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"]
)
def test_a_part_that_never_ends_is_found_without_opening_it(name, kind, make, tmp_path):
    checkpoint = save(tmp_path, 5)
    (checkpoint / name).unlink()
    make(checkpoint / name)
    damage = find_damage(checkpoint)
    assert damage in (f"{name} is {kind}", f"its {name} is {kind}")


@pytest.mark.parametrize(("kind", "make"), [*NOT_REGULAR.items(), ("a file", Path.touch)])
def test_what_is_called_unfinished_gives_way_to_a_save(kind, make, tmp_path):
    make(tmp_path / "unfinished")
    assert find_damage(save(tmp_path, 1)) is None


def test_a_renamed_checkpoint_is_passed_over(tmp_path, caplog):
    first, second = save(tmp_path, 5), save(tmp_path, 10)
    second.rename(tmp_path / "checkpoint-15")
    assert chosen_of(tmp_path) == first
    assert "passed over checkpoint-15: it is step 10's under another name; going on from" in caplog.text


# --- what is deleted --------------------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert steps_of(tmp_path) == [4, 3]


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2, best=1)
    assert steps_of(tmp_path) == [4, 1]


def test_damaged_ones_do_not_count_and_are_left_alone(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "checkpoint-2" / "optimizer.pt", 1)
    os.truncate(tmp_path / "checkpoint-3" / "optimizer.pt", 1)
    folder_of(tmp_path, keep=1).remove_old(newest=3)
    assert steps_of(tmp_path) == [3, 2, 1], "1 is the last good one"


@pytest.mark.parametrize(("keep", "best"), [(1, None), (2, None), (2, 2)])
def test_later_ones_that_were_passed_over_neither_count_nor_go(tmp_path, keep, best):
    for step in (2, 5, 10, 15):
        save(tmp_path, step)
    for step in (10, 15):
        # only reading all of them shows it
        flip_bit(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    for step in (6, 7):
        save(tmp_path, step, keep=keep, best=best)
        assert chosen_of(tmp_path) == tmp_path / f"checkpoint-{step}"
    assert steps_of(tmp_path)[:2] == [15, 10]


def test_a_damaged_one_is_replaced_when_its_step_comes_again(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "left_over").touch()
    assert find_damage(save(tmp_path, 2)) is None
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-1", "checkpoint-2"]


def test_another_runs_are_passed_over_do_not_count_and_are_left_alone(tmp_path, caplog):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)

    def why_foreign(checkpoint: Path) -> str | None:
        return "it is another run's" if checkpoint.name in ("checkpoint-2", "checkpoint-4") else None

    assert chosen_of(tmp_path, why_foreign=why_foreign) == tmp_path / "checkpoint-3"
    assert "passed over checkpoint-4: it is another run's; going on from" in caplog.text
    folder_of(tmp_path, keep=1, why_foreign=why_foreign).remove_old(newest=4)
    assert steps_of(tmp_path) == [4, 3, 2]
    shutil.rmtree(tmp_path / "checkpoint-3")
    with pytest.raises(UsageError, match="no checkpoint in .* is whole and of this run .checkpoint-4: it is another"):
        chosen_of(tmp_path, why_foreign=why_foreign)


# --- several processes ------------------------------------------------------------------------------------------------


def in_two_threads(run: Path, write: Callable[[Path, int], object]) -> dict[int, str]:
    """Two processes' saves of step 3, each as a thread that calls `write(staged, rank)`; what those that fail say."""
    barrier, shared, said = threading.Barrier(2), [None, None], {}

    def of_rank(rank: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            shared[rank] = own[0]
            barrier.wait(10)
            both = list(shared)
            barrier.wait(10)
            return both

        folder = folder_of(run, 2, ProcessPlace(rank, 2, gather))
        folder.begin()
        staged = folder.staging / "checkpoint-3"
        staged.mkdir(exist_ok=True)
        write(staged, rank)
        folder.commit(3)
        try:
            folder.wait()
        except RunStopped as stopped:
            said[rank] = str(stopped)

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return said


def test_each_process_hashes_its_own_files_and_the_first_commits_for_all(tmp_path):
    def write(staged: Path, rank: int) -> None:
        shard = staged / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        shard.parent.mkdir(exist_ok=True)
        shard.write_bytes(bytes([rank]) * 10)
        (staged / f"rng_state_{rank}.pth").write_bytes(b"x")
        if rank == 0:
            (staged / "model.safetensors").write_bytes(b"w")

    assert in_two_threads(tmp_path, write) == {}
    assert find_damage(tmp_path / "checkpoint-3") is None
    assert len(json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())["files"]) == 5


def test_the_reason_of_another_process_is_told_at_once(tmp_path):
    # process 1's file cannot be hashed: process 0, which waits for it, hears of it and of the reason
    def write(staged: Path, rank: int) -> None:
        path = staged / f"rng_state_{rank}.pth"
        path.write_bytes(b"x") if rank == 0 else path.symlink_to("nowhere")

    said = in_two_threads(tmp_path, write)
    assert said[0] == said[1] and said[0].startswith("process 1 could not save a checkpoint: [Errno 2] No such file")
    assert list_checkpoints(tmp_path) == []


def test_a_commit_that_fails_on_one_process_is_raised_on_all(tmp_path):
    def gather(own: list[Any]) -> list[Any]:
        return [*own, "No space left on device"]

    folder = folder_of(tmp_path, 2, ProcessPlace(0, 2, gather))
    with pytest.raises(RunStopped, match="process 1 could not save a checkpoint: No space left on device"):
        folder.begin()


def test_a_folder_that_cannot_be_written_stops_with_the_reason_and_keeps_what_is_there(tmp_path):
    run = tmp_path / "run"
    before = content_of(save(run, 1))
    folder = folder_of(run, 2)
    folder.begin()
    stage(folder, 2)
    # a file where the new checkpoint is to go: no rights or free space are needed for it to fail
    (folder.staging / "checkpoint-2" / "manifest.json.unfinished").mkdir()
    folder.commit(2)
    with pytest.raises(RunStopped, match="process 0 could not save a checkpoint: .*; those before it are whole"):
        folder.wait()
    assert chosen_of(run) == run / "checkpoint-1"
    assert content_of(run / "checkpoint-1") == before


# --- killed at any moment ---------------------------------------------------------------------------------------------

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"}


def save_until(run: Path, last_change: int) -> None:
    """Saves step 3, keeping two, and ends as by SIGKILL before the change to files that comes after `last_change`."""
    changes = iter(range(10**9))

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        # a tree is deleted by names relative to its folders
        is_of_run = str(run) in str(arguments[0]) or event in ("os.remove", "os.rmdir")
        if event in CHANGES and is_of_run and next(changes) >= last_change:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save(run, 3, keep=2)


def test_killed_before_any_change_to_a_file_leaves_the_last_good_one(tmp_path):
    kept = {}
    for step in (1, 2):
        save(tmp_path / "before", step)
        kept[step] = content_of(tmp_path / "before" / f"checkpoint-{step}")
    reference = content_of(save(tmp_path / "reference", 3))
    context = multiprocessing.get_context("fork")
    chosen = []
    for last_change in range(1000):
        run = tmp_path / f"run-{last_change}"
        shutil.copytree(tmp_path / "before", run)
        process = context.Process(target=save_until, args=(run, last_change))
        process.start()
        process.join(20)
        found = chosen_of(run)
        assert found is not None and content_of(found) == (reference if found.name == "checkpoint-3" else kept[2])
        chosen.append(found.name)
        # the next start goes on from there, and its own save leaves nothing behind
        save(run, 4, keep=2)
        assert steps_of(run) == ([4, 3] if found.name == "checkpoint-3" else [4, 2])
        assert {path.name for path in run.iterdir()} == {f"checkpoint-{step}" for step in steps_of(run)}
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert len(chosen) > 25, "few changes were seen"
    # once committed it stays: no later kill falls back
    first_new = chosen.index("checkpoint-3")
    assert first_new > 0 and set(chosen[first_new:]) == {"checkpoint-3"}
