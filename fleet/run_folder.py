"""The files of a run's folder: their names, the replacement of a file as a whole, and lines of JSON.

Imports nothing heavy, so that a report can be written wherever the folder was copied to.
"""

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger("fleet")

CONFIG_NAME = "config.json"
RUN_CONFIG_NAME = "run_config.json"  # the same in a checkpoint, whose own config.json is the model's
IMAGES_NAME = "images.json"  # the SHA-256 of each image that the run draws from, as it began
METRICS_NAME = "metrics.jsonl"
ROLLOUTS_NAME = "rollouts.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
SEPARATE_EVALUATION_NAME = "evaluation.json"  # where evaluate.py may have been told to write
THUMBNAILS_NAME = "thumbnails"
CURVE_NAME = "curve.png"
REPORT_NAME = "report.html"
FINAL_NAME = "final"
MERGED_NAME = "final_merged"
EXPORT_NAME = "export"
TENSORBOARD_NAME = "tensorboard"
EVALUATION_SCHEMA_VERSION = 2
UNFINISHED_NAME = "unfinished"  # unfinished files; none is ever read
# what a run writes in place or reads again
FILE_NAMES = (
    CONFIG_NAME, IMAGES_NAME, METRICS_NAME, ROLLOUTS_NAME, EVALUATIONS_NAME, CURVE_NAME, REPORT_NAME,
)  # fmt: skip
FOLDER_NAMES = (UNFINISHED_NAME, THUMBNAILS_NAME, FINAL_NAME, MERGED_NAME, TENSORBOARD_NAME)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file as a whole: a kill or a power cut leaves the old or the new content. An OSError names the file."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        # a pipe or a link to nothing may be there
        unfinished.unlink(missing_ok=True)
        with unfinished.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        # a full disk is found by calls that know no name
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_folder(folder: Path) -> None:
    """Returns once the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, old: Path) -> None:
    """Puts a folder in another's place; a kill leaves the old one, the new one or none, never half of one.

    The folder that holds `new`, which must be scratch, is deleted.
    """
    if os.path.lexists(old):
        os.replace(old, new.with_name(f"replaced-{old.name}"))
    os.replace(new, old)
    shutil.rmtree(new.parent)


class LineFile:
    """A file of JSON lines that a run appends to. Lines that a full or vanished disk does not take are tried again."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[str] = []
        self._has_warned = False

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Writes the lines, and those that waited. Warns once if the disk takes none."""
        self._waiting += [json.dumps(line) + "\n" for line in lines]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # unbuffered, as a buffer's rest would be written on closing, behind the truncation
            with open(self.path, "ab", buffering=0, opener=open_without_waiting) as file:
                length, rest = file.tell(), "".join(self._waiting).encode()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    # a torn line would end up in the middle of the file
                    with contextlib.suppress(OSError):
                        os.truncate(self.path, length)
                    raise
        except OSError as error:
            if not self._has_warned:
                logger.warning(f"{self.path} cannot be written ({error}); its lines are kept and tried again")
            self._has_warned = True
        else:
            self._waiting.clear()
            self._has_warned = False

    def drop_after(self, step: int) -> list[dict[str, Any]]:
        """Rewrites the file without its lines of later steps and without a torn last one; returns what is left."""
        if not self.path.exists():
            return []
        kept = [line for line in read_jsonl(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        # a disk that is full has room for what is there already
        if text.encode() != self.path.read_bytes():
            write_atomically(self.path, text)
        return kept


def open_without_waiting(path: str, flags: int) -> int:
    """An opener that does not wait for the other end of a pipe; one that writes raises OSError without a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one per line, in order.

    A last line torn by a kill is left out; any other broken line raises ValueError naming the file and the line.
    """
    # bytes, as text would also split at U+2028 inside a string, and a torn line may end inside a character
    lines = path.read_bytes().splitlines()
    objects = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove that line") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} is {line[:40]!r}, but wanted a JSON object; remove that line")
        objects.append(value)
    return objects


def finite(value: Any) -> float | None:
    """`value` as a float; None if it is no number, or not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
