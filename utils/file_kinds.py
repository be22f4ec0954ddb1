"""The kind of thing that a path names, in words, found without opening it.

Opening a pipe waits for its other end, and a device may never end; a link may lead nowhere or in a circle.
"""

import os
import stat
from pathlib import Path

KINDS = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def kind_of(path: Path) -> str | None:
    """ "a file", "a folder", "a link to nothing", "a pipe", "a socket" or "a device"; None if there is nothing.

    Links are followed. Raises OSError for a name too long, a folder that must not be read, a disk that fails.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else None
    return KINDS.get(stat.S_IFMT(mode), "a device")
