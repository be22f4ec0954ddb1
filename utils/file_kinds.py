"""The kind of thing that a path names, in words, found without opening it.

Opening a pipe waits for its other end, and a device may never end; a link may lead nowhere or in a circle.
"""

import os
import stat
from pathlib import Path


def kind_of(path: Path) -> str | None:
    """ "a file", "a folder", "a link to nothing", "a pipe", "a socket" or "a device"; None if there is nothing.

    Links are followed. Raises OSError for a name too long, a folder that must not be read, a disk that fails.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else None
    names = (
        (stat.S_ISREG, "a file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    )  # fmt: skip
    return next((name for is_kind, name in names if is_kind(mode)), "a device")
