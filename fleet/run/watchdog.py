"""Watchdog: ends a process that makes no progress, with the reason in a line, so that no job hangs for ever.

Each call of `beat` is progress. Where one process stalls, the others wait for it in a collective: the stalled one ends
first and says where, and its launcher ends the rest. The waiting ones report a process that is stopped or lost. Time in
which the process itself was stopped (Ctrl-Z, a frozen container, a laptop asleep) does not count.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fleet.run.peers import Peers
from utils.child_process import command_of

STALLED_EXIT_CODE = 70  # sysexits.h: an internal software error
WAITING_GRACE_S = 10.0  # the others wait this much longer, so that a stalled process can say so itself
FROZEN_GRACE_S = 20.0  # until code that gives Python's threads no turn is ended from outside Python
STARTING_S = 1800.0  # before the first generation, a large model may be read from a slow disk
STDERR = 2  # also where sys.stderr is no file
COLLECTIVES = (
    "torch/distributed/",
    "torch/autograd/graph.py",  # a backward pass, which reduces gradients as it goes
    "deepspeed/comm/",
    "deepspeed/runtime/zero/",
    "deepspeed/utils/nvtx.py",
    "accelerate/utils/operations.py",
)


class StillTime:
    """Seconds since the last beat in which the process could run, counted in ticks."""

    def __init__(self, tick_s: float, clock: Callable[[], float] = time.monotonic):
        self.tick_s, self.clock = tick_s, clock
        self._still_s, self._last_tick_s = 0.0, clock()

    def beat(self) -> None:
        """Begins anew."""
        self._still_s = 0.0

    def tick(self) -> float:
        """Ends a tick and returns the seconds so far. A tick counts twice its length at most; the rest was a stop."""
        now_s = self.clock()
        self._still_s += min(now_s - self._last_tick_s, 2 * self.tick_s)
        self._last_tick_s = now_s
        return self._still_s


class Watchdog:
    """Ends the process `timeout_s` seconds after the last `beat`."""

    def __init__(self, timeout_s: float, rank: int):
        """timeout_s: at least 1."""
        self.timeout_s, self.rank = timeout_s, rank
        self.peers = Peers([])  # the other processes, once they are connected
        self.is_watching = True
        self._activity, self._limit_s = "", timeout_s
        self._still = StillTime(min(1.0, timeout_s / 10))

    def start_with(self, activity: str) -> None:
        """Notes progress before the first generation, where one activity may take STARTING_S."""
        self.beat(activity, max(self.timeout_s, STARTING_S))

    def beat(self, activity: str, limit_s: float | None = None) -> None:
        """Notes progress. activity: what begins now, for the report. limit_s: in place of timeout_s."""
        self._activity, self._limit_s = activity, limit_s or self.timeout_s
        self._still.beat()

    def watch(self, frozen_watch: IO[bytes]) -> None:
        """Looks at each tick until `is_watching` ends. frozen_watch: standard input of frozen_watch.py."""
        while True:
            time.sleep(self._still.tick_s)
            still_s = self._still.tick()
            if not self.is_watching:
                return
            limit_s = self._limit_s
            # it may be stopped or ended by somebody, and training may just have ended
            with contextlib.suppress(OSError, ValueError):
                os.write(frozen_watch.fileno(), f"{limit_s + FROZEN_GRACE_S} {self._activity}\n".encode())
            lost = self.peers.first_lost(self._still.tick_s, self.timeout_s + FROZEN_GRACE_S, WAITING_GRACE_S)
            if lost is not None and self.is_watching:
                self._end(f"process {self.rank} ends during {self._activity}, as {lost}")
            if still_s < limit_s:
                continue
            calls = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
            is_waiting = is_of_collective(calls)
            if still_s > limit_s + WAITING_GRACE_S * is_waiting and self.is_watching:
                self._end(self._describe(calls, is_waiting, still_s))

    def _end(self, reason: str) -> None:
        print(f"error: {reason}; go on from the last checkpoint with --resume", file=sys.stderr, flush=True)
        os._exit(STALLED_EXIT_CODE)

    def _describe(self, calls: traceback.StackSummary, is_waiting: bool, still_s: float) -> str:
        where = f"{Path(calls[-1].filename).name}:{calls[-1].lineno} ({calls[-1].name})"
        how = "waits for another process, which has stalled or is lost," if is_waiting else "has stalled"
        return (
            f"process {self.rank} {how} in {where} during {self._activity}: no progress for {still_s:.0f} s "
            "(--step_timeout_s)"
        )


@contextlib.contextmanager
def watched(timeout_s: float) -> Iterator[Watchdog]:
    """Within it, a process that makes no progress for `timeout_s` seconds is ended, and says why."""
    watchdog = Watchdog(timeout_s, int(os.environ.get("RANK", "0")))
    watchdog.start_with("the start of all processes")
    # prints every thread's stack where frozen_watch.py ends this process
    faulthandler.enable(file=STDERR)
    command = command_of("fleet.run.frozen_watch", os.getpid(), watchdog.rank, python_flags=("-E", "-S"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0) as frozen_watch:
        assert frozen_watch.stdin is not None
        os.set_blocking(frozen_watch.stdin.fileno(), False)
        threading.Thread(target=watchdog.watch, args=(frozen_watch.stdin,), daemon=True).start()
        try:
            yield watchdog
        finally:
            watchdog.is_watching = False
            frozen_watch.kill()
    # not after an error: the others hear of it if they do not end for the same reason
    watchdog.peers.say_goodbye()


def is_of_collective(calls: traceback.StackSummary) -> bool:
    """True if a stack's innermost calls are those of a library that exchanges data between processes."""
    return any(name in call.filename for call in calls[-4:] for name in COLLECTIVES)
