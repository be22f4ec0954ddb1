"""Checkpoints that are whole or not there: committed, compared with their manifest, chosen and removed.

A checkpoint is written under `unfinished/`, then a manifest with the size and SHA-256 of each of its files. One rename
makes it `checkpoint-<step>`. Each process hashes and flushes the files that it wrote, in the background, while training
goes on. The trainer says which files a checkpoint has. Imports no torch.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.errors import AgreedUsageError, RunStopped
from fleet.processes import Gather, raise_first
from fleet.run_folder import UNFINISHED_NAME, flush_folder, write_atomically
from utils.file_kinds import kind_of

logger = logging.getLogger("fleet")

MANIFEST_NAME = "manifest.json"
PART_NAME = "manifest.part-{rank}.json"
MAX_WAIT_FOR_PARTS_S = 1800
# of the system, also in the words of other libraries: ENOSPC and EDQUOT
FULL_DISK_WORDS = ("No space left on device", "Disk quota exceeded")
DISPLACED_REMEDY = "this run writes there no more: let the other one go on, or stop it"

# The reason why a whole checkpoint is another run's; None if it is the folder's own.
WhyForeign = Callable[[Path], str | None]


class Displaced(Exception):
    """Another run has taken over the folder."""


@dataclass(frozen=True)
class ProcessPlace:
    """The rank of this process among those of the run, and their `gather`; by default it is the only one."""

    rank: int = 0
    num_processes: int = 1
    gather: Gather = list


def checkpoint_step(path: Path) -> int:
    """The optimizer step in a checkpoint's name; -1 for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else -1


def list_checkpoints(run_folder: Path) -> list[Path]:
    """All that is named like a checkpoint, damaged ones and mere files included, the newest first."""
    found = [path for path in run_folder.glob("checkpoint-*") if checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step, reverse=True)


def find_damage(checkpoint: Path, place: ProcessPlace = ProcessPlace(), *, reads_content: bool = True) -> str | None:
    """The damage of a checkpoint in words; None if it is as its manifest says.

    Compares names, sizes and, with reads_content, the SHA-256 of this process's share of the files. Hidden ones pass.
    """
    try:
        if (kind := kind_of(checkpoint)) != "a folder":
            return f"it is {kind or 'gone'}"
        if (kind := kind_of(checkpoint / MANIFEST_NAME)) != "a file":
            return f"it has no {MANIFEST_NAME}" if kind is None else f"its {MANIFEST_NAME} is {kind}"
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_bytes())
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except Exception as error:
        # a damaged file may hold any JSON; one process must not raise where the others gather
        return f"its {MANIFEST_NAME} cannot be read ({type(error).__name__})"
    if step != checkpoint_step(checkpoint):
        return f"it is step {step}'s under another name"
    try:
        return _compare(checkpoint, listed, place, reads_content=reads_content)
    except OSError as error:
        return f"it cannot be read ({error.strerror}: {error.filename})"


def choose_checkpoint(run_folder: Path, place: ProcessPlace, why_foreign: WhyForeign) -> Path | None:
    """The newest sound checkpoint of this run, the same on all processes; None where there is no checkpoint.

    Damage that one process finds in its share counts for all. Raises UsageError if all are damaged or foreign.
    """
    found: list[str] = []
    # process 0's list: another process may see a folder change between two looks
    for checkpoint in place.gather([list_checkpoints(run_folder)])[0]:
        damages = filter(None, place.gather([find_damage(checkpoint, place) or why_foreign(checkpoint)]))
        if (damage := next(damages, None)) is None:
            if found:
                logger.warning(f"resume: passed over {'; '.join(found)}; going on from {checkpoint}")
            return checkpoint
        found.append(f"{checkpoint.name}: {damage}")
    if found:
        raise AgreedUsageError(
            f"resume: no checkpoint in {run_folder} is whole and of this run ({'; '.join(found)}); restore one, or "
            "begin another run in another --output_dir"
        )
    return None


class CheckpointFolder:
    """The checkpoints of one run: `begin`, write into `staging`, `commit`; `wait` before relying on it.

    All processes call each method together, and all raise RunStopped if a commit failed on any.
    """

    def __init__(
        self,
        run_folder: Path,
        place: ProcessPlace,
        keep: int,
        on_waiting: Callable[[], object],
        displaced_by: Callable[[], str | None],
        why_foreign: WhyForeign,
    ):
        """keep: whole checkpoints to keep, at least 1. on_waiting: called every second while a commit is waited for.

        displaced_by: who has taken over the folder, if anybody; process 0 asks before it changes anything there.
        """
        self.run_folder, self.place, self.keep = run_folder, place, keep
        # a checkpoint is written there; nothing in it is ever resumed from
        self.staging = run_folder / UNFINISHED_NAME
        self._on_waiting, self._displaced_by, self._why_foreign = on_waiting, displaced_by, why_foreign
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._has_failed_elsewhere = threading.Event()

    def begin(self) -> None:
        """Ends the commit before this one, and makes an empty staging folder."""
        self.wait()
        if self.place.rank == 0:
            try:
                self.run_folder.mkdir(parents=True, exist_ok=True)
                self._require_not_displaced()
                remove_unfinished(self.run_folder)
                self.staging.mkdir(exist_ok=True)
            except (OSError, Displaced) as error:
                self._failure = error
        self._raise_together(self.place.gather([self._own_failure()]))

    def commit(self, step: int, kept_best: int | None = None) -> None:
        """Makes the staged checkpoint of `step` the newest, in the background; deletes old ones, but `kept_best`."""
        self._thread = threading.Thread(target=self._commit, args=(step, kept_best), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns once the last commit of all processes is on disk."""
        # process 0 waits for the parts of the others, and must hear first that one will not come
        if self.place.rank != 0:
            self._join()
        failures = self.place.gather([None if self.place.rank == 0 else self._own_failure()])
        if any(failures):
            self._has_failed_elsewhere.set()
        if self.place.rank == 0:
            self._join()
        failure_of_first = self.place.gather([self._own_failure() if self.place.rank == 0 else None])
        self._has_failed_elsewhere.clear()
        self._raise_together(failures if any(failures) else failure_of_first)

    def remove_old(self, newest: int, kept_best: int | None = None) -> None:
        """Deletes whole checkpoints of this run up to step `newest`, but the last `keep` of them and the best."""
        # a resumed run has passed over later ones, for damage that only reading them shows
        candidates = [path for path in list_checkpoints(self.run_folder) if checkpoint_step(path) <= newest]
        whole = [path for path in candidates if not (find_damage(path, reads_content=False) or self._why_foreign(path))]
        others = [path for path in whole if checkpoint_step(path) != kept_best]
        num_kept = self.keep if len(others) == len(whole) else max(1, self.keep - 1)
        for path in others[num_kept:]:
            # a kill while it is deleted must not leave a checkpoint of half its files
            doomed = self.staging / f"removed-{path.name}"
            doomed.parent.mkdir(exist_ok=True)
            os.replace(path, doomed)
            shutil.rmtree(doomed)

    def _join(self) -> None:
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1.0)
            self._on_waiting()
        self._thread = None

    def _own_failure(self) -> str | None:
        error = self._failure
        if error is None:
            return None
        # an error that is not the disk's says nothing without its kind
        reason = str(error) if isinstance(error, (OSError, Displaced)) else f"{type(error).__name__}: {error}"
        return f"{reason}; those before it are whole; {remedy_of(error, self.run_folder)}, and pass --resume"

    def _require_not_displaced(self) -> None:
        if displaced_by := self._displaced_by():
            raise Displaced(f"{self.run_folder} was taken over by {displaced_by}")

    def _raise_together(self, failures: list[str | None]) -> None:
        self._failure = None
        raise_first(failures, RunStopped, "process {rank} could not save a checkpoint: ")

    def _commit(self, step: int, kept_best: int | None) -> None:
        staged = self.staging / f"checkpoint-{step}"
        try:
            own = [staged / name for name in _own_files(staged, self.place)]
            part = {path.relative_to(staged).as_posix(): describe_file(path) for path in own}
            for folder in {path.parent for path in own}:
                flush_folder(folder)
            write_atomically(self.staging / PART_NAME.format(rank=self.place.rank), json.dumps(part))
            if self.place.rank == 0:
                self._commit_whole(staged, step)
                self._tidy_up(step, kept_best)
        except Exception as error:
            # raised by `wait`, where the training loop can stop for it
            self._failure = error

    def _tidy_up(self, step: int, kept_best: int | None) -> None:
        try:
            self.remove_old(step, kept_best)
            remove_unfinished(self.run_folder)
        except OSError as error:
            # the new checkpoint is whole, and old ones cost no more than room
            logger.warning(f"an old checkpoint could not be deleted ({error})")

    def _commit_whole(self, staged: Path, step: int) -> None:
        files: dict[str, Any] = {}
        for rank in range(self.place.num_processes):
            files |= _read_part(self.staging / PART_NAME.format(rank=rank), self._has_failed_elsewhere)
        if files.keys() != set(_file_names(staged)):
            raise OSError(
                f"{staged} has files that no process wrote, or lacks some; --output_dir must be one folder that all "
                "machines share"
            )
        manifest = {"step": step, "num_processes": self.place.num_processes, "files": dict(sorted(files.items()))}
        write_atomically(staged / MANIFEST_NAME, json.dumps(manifest, indent=1))
        final = self.run_folder / staged.name
        self._require_not_displaced()
        if os.path.lexists(final):
            # damaged or another run's, or it would have been resumed from
            os.replace(final, self.staging / f"replaced-{final.name}")
        os.replace(staged, final)
        flush_folder(self.run_folder)


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, which is flushed to the disk first."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remedy_of(error: Exception, folder: Path) -> str:
    """The remedy of a failure to write into a folder: to make room only where the disk or quota is full."""
    if isinstance(error, Displaced):
        return DISPLACED_REMEDY
    try:
        room = f"make room ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free there)"
    except OSError:
        room = "make room (its folder is gone)"
    if any(words in str(error) for words in FULL_DISK_WORDS):
        return room
    if isinstance(error, OSError):
        return f"restore {folder}"
    # torch and safetensors pass on no more than that they could not write
    unsaid = type(error).__name__ in ("RuntimeError", "SafetensorError")
    return f"{room} or restore {folder}" if unsaid else "correct it"


def remove_unfinished(run_folder: Path) -> None:
    """Deletes the rest of a save that was cut off. Raises OSError if a visible file of it stays."""
    folder = run_folder / UNFINISHED_NAME
    if folder.is_symlink() or not folder.is_dir():
        # not Fleet's own
        folder.unlink(missing_ok=True)
        return
    # a file that another process still reads stays on NFS, under a hidden name
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists() and (left := _file_names(folder)):
        raise OSError(f"{folder / left[0]} cannot be deleted")


def _compare(
    checkpoint: Path, listed: dict[str, tuple[int, str]], place: ProcessPlace, *, reads_content: bool
) -> str | None:
    there = set(_file_names(checkpoint)) - {MANIFEST_NAME}
    if missing := sorted(listed.keys() - there):
        return f"{missing[0]} is missing"
    if unknown := sorted(there - listed.keys()):
        return f"its manifest does not list {unknown[0]}"
    for name, (size, _) in listed.items():
        if (kind := kind_of(checkpoint / name)) != "a file":
            return f"{name} is {kind or 'gone'}"
        if (actual := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    # the largest first and dealt in turns, so that every process reads about as much
    by_size = sorted(listed, key=lambda name: (-listed[name][0], name))
    for name in by_size[place.rank :: place.num_processes] if reads_content else ():
        with (checkpoint / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != listed[name][1]:
                return f"the content of {name} is not what was saved"
    return None


def _file_names(folder: Path) -> list[str]:
    """The paths of all visible files below a folder, relative to it."""
    relative = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    return [path.as_posix() for path in relative if not any(part.startswith(".") for part in path.parts)]


def _own_files(folder: Path, place: ProcessPlace) -> list[str]:
    """The files that this process wrote: those with its number in their names, and for process 0 all others."""
    numbered = re.compile(r"(?:zero_pp_rank_|bf16_zero_pp_rank_|rng_state_)(\d+)")
    names = [(name, numbered.match(Path(name).name)) for name in _file_names(folder)]
    return [name for name, match in names if (int(match[1]) if match else 0) == place.rank]


def _read_part(path: Path, will_not_come: threading.Event) -> dict[str, Any]:
    """A process's part of the manifest, which is waited for."""
    deadline_s = time.monotonic() + MAX_WAIT_FOR_PARTS_S
    while not path.exists():
        if will_not_come.is_set():
            raise OSError(f"{path} will not come")
        if time.monotonic() > deadline_s:
            raise OSError(f"{path} did not come within {MAX_WAIT_FOR_PARTS_S} s")
        time.sleep(0.01)
    return json.loads(path.read_bytes())
