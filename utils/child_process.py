"""What a process that serves another one does to end with it.

Imports nothing heavy, as such processes must start in an instant.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent(parent_pid: int) -> None:
    """Has the system end this process when its parent ends, however that ends and whatever this process does then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(0)
