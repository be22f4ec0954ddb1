"""A process that serves another one: started in any working directory, and ended with its parent.

Imports nothing heavy, as such processes must start in an instant.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # of prctl(2)


def command_of(module: str, *arguments: object, python_flags: tuple[str, ...] = ()) -> list[str]:
    """The command that calls `main()` of one of Fleet's modules in a new process, with these words in sys.argv[1:].

    The process finds Fleet's modules in Fleet's own folder, and none in the working directory.
    """
    path = f"sys.path[:] = [{str(ROOT)!r}, *filter(None, sys.path)]"
    program = f"import sys; {path}; from {module} import main; sys.exit(main())"
    return [sys.executable, *python_flags, "-c", program, *map(str, arguments)]


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state (field 3 in proc(5)) on; for a process that is gone, X alone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ["X"]


def end_with_parent(parent_pid: int) -> None:
    """Has the system end this process when its parent ends, in whatever way and at whatever moment."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(0)
