"""One run at a time writes into a folder: who is refused, who takes over, and what is left."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import UsageError
from fleet.run_folder import CONFIG_NAME
from fleet.run_lock import RunLock, require_free
from tests import HANG_S

pytestmark = pytest.mark.fast

NEVER_S = 1e9
SPAWN = multiprocessing.get_context("spawn")


def hold(folder: Path, barrier: Barrier, said: Any) -> None:
    """A process that takes the folder, says so, and holds it until it is killed or told to let go."""
    barrier.wait(HANG_S)
    try:
        with RunLock(folder):
            said.put((os.getpid(), None))
            signal.sigwait({signal.SIGTERM})
    except UsageError as error:
        said.put((os.getpid(), str(error)))


@contextmanager
def holders(folder: Path, number: int) -> Iterator[dict[int | None, tuple[SpawnProcess, str | None]]]:
    """So many processes that take the folder in the same instant; by process id, each and its refusal, if any."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    barrier, said = SPAWN.Barrier(number), SPAWN.Queue()
    processes = [SPAWN.Process(target=hold, args=(folder, barrier, said)) for _ in range(number)]
    try:
        for process in processes:
            process.start()
        refusals = dict(said.get(timeout=HANG_S) for _ in processes)
        yield {process.pid: (process, refusals[process.pid]) for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def leave_lock(folder: Path, number: int = 1, *, silent_s: float = 0.0, **changes: object) -> Path:
    """The lock of a run on another machine, as it left it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"run-{number}.lock"
    said = {"host": "node17", "machine": "another boot", "pid": 4711, "pid_started": "1", "inode": 1, "token": "x",
            "since": "2026-11-26 09:00:00"}  # fmt: skip
    path.write_text(json.dumps(said | changes))
    os.utime(path, (time.time() - silent_s,) * 2)
    return path


def test_a_lock_says_who_holds_it_and_goes_with_the_run(tmp_path: Path) -> None:
    with RunLock(tmp_path / "deep" / "run") as lock:
        (path,) = (tmp_path / "deep" / "run").iterdir()
        said = json.loads(path.read_text())
        assert path.name == "run-1.lock" and lock.displaced_by() is None
        assert (said["host"], said["pid"]) == (socket.gethostname(), os.getpid()) and said["since"][:2] == "20"
    assert list(tmp_path.iterdir()) == [], "nothing was written, so nothing is left"


def test_a_folder_with_a_runs_files_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        (tmp_path / "run" / CONFIG_NAME).write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [CONFIG_NAME]


@pytest.mark.parametrize("dead_runs_lock", [False, True])
def test_of_several_that_start_in_one_instant_one_wins(dead_runs_lock: bool, tmp_path: Path) -> None:
    if dead_runs_lock:
        leave_lock(tmp_path, number=7, silent_s=3600)
    with holders(tmp_path, 4) as started:
        winners = [pid for pid, (_, refusal) in started.items() if refusal is None]
        assert len(winners) == 1
        for _, refusal in started.values():
            words = f"output_dir={tmp_path} is in use: process {winners[0]} on {socket.gethostname()} (since 20"
            assert refusal is None or refusal.startswith(words)
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(UsageError, match=f"is in use: process {winners[0]} on"):
            require_free(tmp_path)


def test_after_sigkill_the_next_start_takes_over_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holders(tmp_path, 1) as started:
        ((pid, (process, _)),) = started.items()
        process.kill()
        # not asked for yet by its parent, a killed process is still in the table
        os.waitid(os.P_PID, pid or 0, os.WEXITED | os.WNOWAIT)
        require_free(tmp_path)
        with RunLock(tmp_path, silence_s=NEVER_S):
            assert [path.name for path in tmp_path.iterdir()] == ["run-2.lock"]
    assert (
        f"process {pid} on {socket.gethostname()}" in caplog.text and "is gone; its lock is taken over" in caplog.text
    )


def test_a_process_that_was_given_a_dead_ones_id_is_not_taken_for_it(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        said = json.loads((tmp_path / "run-1.lock").read_text())
    path = leave_lock(tmp_path, **said)
    leave_lock(tmp_path, **(said | {"inode": path.stat().st_ino, "pid_started": "12"}))
    with RunLock(tmp_path, silence_s=NEVER_S) as lock:
        assert lock.displaced_by() is None


def test_a_holder_elsewhere_that_touches_its_lock_is_alive(tmp_path: Path) -> None:
    path, is_over = leave_lock(tmp_path), threading.Event()

    def beat() -> None:
        while not is_over.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError) as refusal, RunLock(tmp_path, silence_s=HANG_S):
            pass
    finally:
        is_over.set()
        thread.join()
    assert "is in use: process 4711 on node17 (since 2026-11-26 09:00:00) trains in it" in str(refusal.value)
    assert f"or delete {path} if there is no such process" in str(refusal.value) and "\n" not in str(refusal.value)
    assert [found.name for found in tmp_path.iterdir()] == ["run-1.lock"]


@pytest.mark.parametrize(
    ("silent_s", "silence_s"),
    [
        pytest.param(3600.0, 60.0, id="long silent: no wait"),
        pytest.param(0.0, 0.2, id="just died: until it has been silent for long"),
        pytest.param(-3600.0, 0.2, id="its clock was set back"),
    ],
)
def test_a_holder_elsewhere_that_is_silent_is_taken_over(
    silent_s: float, silence_s: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave_lock(tmp_path, silent_s=silent_s)
    with RunLock(tmp_path, silence_s=silence_s):
        assert [path.name for path in tmp_path.iterdir()] == ["run-2.lock"]
    assert "process 4711 on node17 (since 2026-11-26 09:00:00) was in it and is gone" in caplog.text
    assert ("waiting up to" in caplog.text) == (silent_s <= 0)


@pytest.mark.parametrize("content", ["", '{"host": "no', "[1]", '{"pid": "x", "machine": 3}'])
def test_a_lock_that_a_kill_left_unwritten_keeps_nobody_out_for_ever(content: str, tmp_path: Path) -> None:
    (tmp_path / "run-3.lock").write_text(content)
    with RunLock(tmp_path, silence_s=0.2):
        assert [path.name for path in tmp_path.iterdir()] == ["run-4.lock"]


def test_a_copy_of_a_folder_in_which_a_run_goes_on_is_free(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        require_free(tmp_path / "copy")
        with RunLock(tmp_path / "copy", silence_s=0.2):
            pass


def test_a_run_whose_lock_was_taken_over_is_told_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        theirs = leave_lock(tmp_path, number=2)
        assert lock.displaced_by() == "process 4711 on node17 (since 2026-11-26 09:00:00)"
        theirs.unlink()
        assert lock.displaced_by() is not None, "what they wrote meanwhile is not known here"
        leave_lock(tmp_path)  # under the number that was its own
    assert json.loads((tmp_path / "run-1.lock").read_text())["host"] == "node17"


def test_taken_over_and_let_go_again_is_told_too(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        (tmp_path / CONFIG_NAME).write_text("{}")
        (tmp_path / "run-1.lock").unlink()
        assert lock.displaced_by() == "somebody who deleted its lock"


def test_a_folder_that_went_away_is_held_again_where_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunLock(run) as lock:
        run.rename(tmp_path / "gone")
        assert lock.displaced_by() is None and not run.exists()
        run.mkdir()
        assert lock.displaced_by() is None
        with pytest.raises(UsageError, match="is in use: process"), RunLock(run):
            pass


def test_a_holder_touches_its_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path, beat_s=0.01):
        path = tmp_path / "run-1.lock"
        os.utime(path, (1, 1))
        deadline_s = time.monotonic() + HANG_S
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_a_folder_that_cannot_be_made_is_refused_by_name_and_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(
        UsageError, match=r"output_dir=.*file/run cannot be written to \(Not a directory\); make it"
    )
    with refused, RunLock(tmp_path / "file" / "run"):
        pass


def test_a_ctrl_c_while_the_lock_is_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
