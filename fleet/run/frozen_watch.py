"""Run beside a process of a run: ends it when it gives Python's threads no turn, which no thread of its own could do.

    python frozen_watch.py <process id> <rank>

The watchdog's thread writes a line per tick to standard input: the seconds without a line that end the process, and its
activity. Time in which the process or this one is stopped does not count.
"""

import os
import resource
import select
import signal
import sys
import time

from utils.child_process import end_with_parent, stat_of

LOOK_S = 1.0
LAST_WORDS_S = 5.0  # for the stacks that a process prints as it ends


def main() -> None:
    """Watches until the process closes the pipe or is gone."""
    pid, rank = int(sys.argv[1]), sys.argv[2]
    end_with_parent(pid)
    # the process that is watched decides when it ends
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    latest, silent_s = b"", 0.0
    while True:
        if select.select([0], [], [], LOOK_S)[0]:
            content = os.read(0, 65536)
            if not content:
                return
            latest, silent_s = content.splitlines()[-1], 0.0
            continue
        # a look counts as it should last: in a longer one this process was stopped; T and t: the other one is stopped
        silent_s += 0.0 if stat_of(pid)[0] in "Tt" else LOOK_S
        limit_s, _, activity = latest.decode(errors="replace").partition(" ")
        if latest and silent_s >= float(limit_s):
            end(pid, rank, activity, silent_s)


def end(pid: int, rank: str, activity: str, silent_s: float) -> None:
    """Says why and ends the process, which prints its stacks."""
    print(
        f"error: process {rank} has stalled during {activity}, in code that holds Python's lock (its stack follows): "
        f"no sign of it for {silent_s:.0f} s (--step_timeout_s); go on from the last checkpoint with --resume",
        file=sys.stderr,
        flush=True,
    )
    # no core file of a model's size
    resource.prlimit(pid, resource.RLIMIT_CORE, (0, resource.prlimit(pid, resource.RLIMIT_CORE)[1]))
    os.kill(pid, signal.SIGABRT)
    # once the other has printed its stacks and ended, this process ends with it
    time.sleep(LAST_WORDS_S)
    os.kill(pid, signal.SIGKILL)
