"""The folder in which Fleet keeps what it has made once: toy models, and data sets unpacked to image files."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fleet.errors import UsageError, reason_of


def cache_folder() -> Path:
    """`$FLEET_CACHE`, else `$XDG_CACHE_HOME/fleet`, else `~/.cache/fleet`."""
    if "FLEET_CACHE" in os.environ:
        return Path(os.environ["FLEET_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleet"


def made_once(path: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], object], what: str) -> Path:
    """`path`, a folder in the cache, after `make` has filled it if it was not whole.

    One process makes it, others wait, and it appears whole or not at all. make: fills the empty folder that it is
    given. what: its name, for errors. Raises UsageError if the cache cannot be written.
    """
    if is_whole(path):
        return path
    with contextlib.ExitStack() as stack:
        with keeping(path.parent, what):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((path.parent / f"{path.name.partition('-')[0]}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_whole(path):
            unfinished = path.with_name(f"{path.name}.unfinished")
            with keeping(path.parent, what):
                for folder in (path, unfinished):
                    shutil.rmtree(folder, ignore_errors=True)
                unfinished.mkdir()
            make(unfinished)
            with keeping(path.parent, what):
                os.replace(unfinished, path)
    return path


@contextlib.contextmanager
def keeping(root: Path, what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Within it, an OSError, or an error of these kinds, is a failure to write to the cache and becomes a UsageError.

    root: the folder that is written to, where the error names none. what: the name of what is kept.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, *kinds)):
            raise
        reason = f"{getattr(error, 'filename', None) or root}: {reason_of(error)}"
        raise UsageError(f"{what} cannot be kept ({reason}); set FLEET_CACHE to a folder to write to") from error
