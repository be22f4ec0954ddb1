"""A run's folder before the run: checked, named, emptied. Imports no torch.

run_lock.py says who may write into it, and run_folder.py names what a run leaves in it.
"""

import datetime
import itertools
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fleet.command.training_flags import RunFlags
from fleet.errors import UsageError, reason_of
from fleet.model_folder.files import base_of, read_json
from fleet.run_folder import CONFIG_NAME, FILE_NAMES, FOLDER_NAMES
from fleet.run_lock import is_lock
from utils.file_kinds import kind_of

logger = logging.getLogger("fleet")

NEW_RUNS = Path("runs")  # where a run without --output_dir makes its folder
MAX_NAME_CHARS = 80  # of a model in a folder's name


def require_output_dir(run: RunFlags, paths_read: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raises UsageError if the run would mix with another one's files, or has none to resume.

    paths_read: those that must survive `--overwrite`, by what named them.
    """
    if run.output_dir is None:
        require_can_be_made(NEW_RUNS, f"output_dir: {NEW_RUNS.absolute()}, where runs without one go,")
        return
    folder = Path(run.output_dir)
    require_can_be_made(folder, f"output_dir={folder}")
    if run.resume:
        if not is_run_folder(folder):
            raise UsageError(
                f"resume: {folder} has no {CONFIG_NAME} of a run; pass the output_dir of one, or --resume auto to "
                "begin one where there is none"
            )
        require_right_kinds(folder)
    # a run killed as it began may have left no more than an unfinished file or its lock
    elif folder.is_dir() and any(path.suffix != ".unfinished" and not is_lock(path) for path in folder.iterdir()):
        require_can_be_emptied(folder, paths_read, overwrite=run.overwrite)


def require_can_be_made(folder: Path, words: str, flag: str = "output_dir") -> None:
    """Raises UsageError unless there is a folder to write to, or one can be made.

    words, flag: name it, for the message.
    """
    try:
        kind = kind_of(folder)
        astray = next((path for path in folder.parents if kind_of(path) == "a link to nothing"), None)
        nearest = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    except (OSError, ValueError, RuntimeError) as error:
        # a name that is too long, a link in a circle, a zero byte
        raise UsageError(f"{words} is not a valid folder ({reason_of(error)}); pass another --{flag}") from error
    if kind not in (None, "a folder"):
        raise UsageError(f"{words} is {kind}; pass a folder as --{flag}")
    if astray is not None:
        raise UsageError(f"{words} lies in {astray}, a link to nothing; mount it, or pass another --{flag}")
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"{words}: {nearest} is not a folder to write to; pass another --{flag}")


def require_right_kinds(folder: Path) -> None:
    """Raises UsageError if a file or folder of the run is of another kind, such as a pipe, on which it would wait."""
    for name, wanted in (dict.fromkeys(FILE_NAMES, "a file") | dict.fromkeys(FOLDER_NAMES, "a folder")).items():
        try:
            kind = kind_of(folder / name)
        except OSError as error:
            raise UsageError(f"resume: {folder / name} cannot be read ({reason_of(error)}); restore it") from error
        if kind not in (None, wanted):
            raise UsageError(f"resume: {folder / name} is {kind}, wanted {wanted}; move it away")


def require_can_be_emptied(folder: Path, paths_read: Mapping[str, str], *, overwrite: bool) -> None:
    """Raises UsageError unless --overwrite is given for the folder of a run, and the new run reads nothing in it."""
    if not overwrite:
        raise UsageError(
            f"output_dir={folder} is not empty; pass --resume to continue the run in it, --overwrite to delete it, "
            "or another folder"
        )
    if not is_run_folder(folder):
        raise UsageError(
            f"overwrite: output_dir={folder} holds no Fleet run, so nothing in it is deleted; pass another folder"
        )
    if folder.is_symlink():
        raise UsageError(f"overwrite: output_dir={folder} is a symbolic link; pass the folder itself")
    for name, used in paths_read.items():
        if Path(used).resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"overwrite: {name}={used} lies in output_dir={folder}, which would be deleted before it is read; "
                "pass another output_dir"
            )


def paths_read(model_id: str, data_root: str, code: Mapping[str, str]) -> dict[str, str]:
    """The paths that a run reads, by the flag that named them. code: the specs of the user's own code, by flag."""
    files = {flag: spec.rpartition(":")[0] for flag, spec in code.items()}
    return {"model_id": model_id, "data_root": data_root, **files, "base model": base_of(model_id)}


def is_run_folder(folder: Path) -> bool:
    """True if a run left its configuration in `folder`."""
    path = folder / CONFIG_NAME
    return path.is_file() and "options" in read_json(path)


def make_new_output_dir(model_id: str) -> Path:
    """A new folder of this run alone, also if another run starts in the same second. Raises UsageError."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_id).resolve().name)[:MAX_NAME_CHARS]
    stem = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}"
    for number in itertools.count(1):
        folder = NEW_RUNS / (stem if number == 1 else f"{stem}-{number}")
        try:
            NEW_RUNS.mkdir(exist_ok=True)
            folder.mkdir()
            break
        except OSError as error:
            if isinstance(error, FileExistsError) and NEW_RUNS.is_dir():
                continue
            raise UsageError(
                f"output_dir: {folder} cannot be made ({reason_of(error)}); pass --output_dir with a folder to write to"
            ) from error
    logger.info(f"--output_dir {folder}: a new folder each time\n")
    return folder


def empty_run_folder(folder: Path) -> None:
    """Deletes a run's files but its lock, config.json last: after a kill --overwrite works again."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != CONFIG_NAME and not is_lock(path):
            path.unlink()
    (folder / CONFIG_NAME).unlink(missing_ok=True)
