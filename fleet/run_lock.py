"""RunLock: one run at a time writes into a folder, also where several machines share it.

A lock is a file `run-<n>.lock` that names its holder. It is made exclusively, which is atomic on NFS too, where `flock`
may be missing. The highest number holds, so one of two runs wins that take over a dead run's lock at once. A holder on
this machine lives if its process does; one elsewhere lives if it goes on touching its file. Imports no torch.
"""

import contextlib
import datetime
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from fleet.errors import UsageError, reason_of
from fleet.run_folder import CONFIG_NAME, open_without_waiting
from utils.child_process import stat_of

logger = logging.getLogger("fleet")

BEAT_S = 5.0  # between two touches of a lock that is held
SILENCE_S = 60.0  # without a touch, after which a holder on another machine counts as dead
LOCK_NAME = re.compile(r"run-(\d+)\.lock")


def is_lock(path: Path) -> bool:
    """True for a file that has a lock's name."""
    return LOCK_NAME.fullmatch(path.name) is not None


def require_free(folder: Path) -> None:
    """Raises UsageError if a process of this machine holds the folder; waits for nothing and writes nothing."""
    try:
        path = _newest_lock(folder)
    except (OSError, ValueError):
        # require_output_dir refuses what is not a folder's name
        return
    if path is not None and _lives(holder := _read_holder(path), path):
        raise _in_use(folder, path, holder)


class RunLock:
    """The right of one process to write into `folder`, within it."""

    def __init__(self, folder: Path, *, beat_s: float = BEAT_S, silence_s: float = SILENCE_S):
        """beat_s, silence_s: the same for all runs that share a folder."""
        self.folder, self.beat_s, self.silence_s = folder, beat_s, silence_s
        self._token = uuid.uuid4().hex
        self._number = 0
        self._made: list[Path] = []  # the folders that were made for it, the innermost first
        self._displaced: str | None = None
        self._mutex = threading.Lock()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Makes the folder if need be, and the lock in it. Takes over the lock of a dead run.

        Waits silence_s if the lock is another machine's. Raises UsageError if its holder lives, or a write fails.
        """
        try:
            missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            while not self._claim():
                continue
        # also for a Ctrl-C: within what did not begin, nothing releases it later
        except BaseException as error:
            self.__exit__()
            if isinstance(error, UsageError) or not isinstance(error, (OSError, ValueError)):
                raise
            raise UsageError(
                f"output_dir={self.folder} cannot be written to ({reason_of(error)}); make it writable with room on "
                "its disk, or pass another folder"
            ) from error
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def displaced_by(self) -> str | None:
        """The holder that has taken over the folder, in words; None while this run may write.

        Where the folder was moved away or emptied during the run, the lock is made anew.
        """
        with self._mutex:
            if self._displaced is None and self._number:
                with contextlib.suppress(OSError):
                    self._displaced = self._look()
            return self._displaced

    def __exit__(self, *error: object) -> None:
        """Deletes the lock unless it was taken over, and the folders that were made for it if they are still empty."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine(self._path):
                self._path.unlink()
        self._number = 0
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    @property
    def _path(self) -> Path:
        return self.folder / f"run-{self._number}.lock"

    def _is_mine(self, path: Path) -> bool:
        return _read_holder(path).get("token") == self._token

    def _claim(self) -> bool:
        """Makes the next lock if the newest is a dead run's. False where another process was faster."""
        newest = _newest_lock(self.folder)
        dead = {} if newest is None else self._require_dead(newest)
        self._number = 1 if newest is None else _number_of(newest) + 1
        if not self._make():
            return False
        # somebody may have taken the folder and let it go since the look
        if _newest_lock(self.folder) != self._path or (newest and _read_holder(newest) not in ({}, dead)):
            self._path.unlink(missing_ok=True)
            return False
        if newest is not None:
            logger.warning(f"output_dir={self.folder}: {_who(dead)} was in it and is gone; its lock is taken over")
        for path in _locks(self.folder):
            if path != self._path:
                path.unlink(missing_ok=True)
        return True

    def _make(self) -> bool:
        """Writes the lock; False if there is one of its number."""
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            holder = {
                "host": socket.gethostname(),
                "machine": _this_machine(),
                "pid": os.getpid(),
                "pid_started": _start_of(os.getpid()),
                "since": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
                # tells a copy of the folder apart
                "inode": os.fstat(descriptor).st_ino,
                "token": self._token,
            }
            os.write(descriptor, json.dumps(holder).encode())
            os.fsync(descriptor)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _require_dead(self, path: Path) -> dict[str, Any]:
        """The holder of a dead run's lock. Raises UsageError as soon as the holder shows life."""
        started_s, first = time.monotonic(), _touched_ns(path)
        silent_s = 0.0 if first is None else max(0.0, (self._now_ns() - first) / 1e9)
        has_said = False
        while _touched_ns(path) == first and first is not None:
            holder = _read_holder(path)
            if lives := _lives(holder, path):
                raise _in_use(self.folder, path, holder)
            left_s = self.silence_s - silent_s - (time.monotonic() - started_s)
            if lives is False or left_s <= 0:
                return holder
            if holder and not has_said:
                logger.warning(f"output_dir={self.folder}: waiting up to {left_s:.0f} s to see if {_who(holder)} lives")
                has_said = True
            # a lock that is being written has its holder in a moment
            time.sleep(min(1.0, self.silence_s / 20) if holder else 0.01)
        if first is None or _touched_ns(path) is None:
            return {}
        raise _in_use(self.folder, path, _read_holder(path))

    def _now_ns(self) -> int:
        """The time by the clock that stamps files in the folder, which is another machine's on NFS."""
        probe = self.folder / f"{self._token}.unfinished"
        try:
            probe.touch()
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._is_over.wait(self.beat_s):
            if self.displaced_by() is None:
                with contextlib.suppress(OSError):
                    os.utime(self._path)

    def _look(self) -> str | None:
        newest = _newest_lock(self.folder)
        if newest is not None:
            return None if newest == self._path and self._is_mine(newest) else _who(_read_holder(newest))
        if (self.folder / CONFIG_NAME).exists():
            return "somebody who deleted its lock"
        if self.folder.is_dir():
            self._make()
        return None


def _number_of(lock: Path) -> int:
    return int(lock.stem.removeprefix("run-"))


def _locks(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_lock(path)] if folder.is_dir() else []


def _newest_lock(folder: Path) -> Path | None:
    return max(_locks(folder), key=_number_of, default=None)


def _read_holder(path: Path) -> dict[str, Any]:
    """The holder that a lock names; empty if the lock is gone, not written yet, or torn by a kill."""
    try:
        holder = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _touched_ns(path: Path) -> int | None:
    """The time of a lock's last touch; None if it is gone. Opens the file, as NFS answers a mere look from memory."""
    try:
        # somebody may have put a pipe there
        with open(path, "rb", buffering=0, opener=open_without_waiting) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _this_machine() -> str | None:
    """The machine since its start, and the container: processes that share both see each other's ids."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """The start of a process in the kernel's ticks, which tells it from a later one of its id; None if dead."""
    fields = stat_of(pid)
    # a zombie has ended, and its parent has not asked for it yet
    return None if fields[0] in "ZX" else fields[19]


def _lives(holder: dict[str, Any], path: Path) -> bool | None:
    """True if a lock's holder lives; None if that does not show on this machine, or the lock may be a mere copy."""
    here = _this_machine()
    if here is None or holder.get("machine") != here or not isinstance(holder.get("pid"), int):
        return None
    started = _start_of(holder["pid"])
    if started is None or started != holder.get("pid_started"):
        return False
    with contextlib.suppress(OSError):
        return True if path.stat().st_ino == holder.get("inode") else None
    return None


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _in_use(folder: Path, path: Path, holder: dict[str, Any]) -> UsageError:
    return UsageError(
        f"output_dir={folder} is in use: {_who(holder)} trains in it, and one run at a time may; wait for it or stop "
        f"it, pass another --output_dir, or delete {path} if there is no such process"
    )
