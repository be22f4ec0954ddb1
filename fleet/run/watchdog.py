"""Watchdog: ends a process that makes no progress, with the reason in a line, so that no job hangs for ever.

Where one process stalls, the others wait for it in a collective: the one that stalls ends first and says where, and
its launcher ends the rest. A process that is stopped or lost is reported by those that wait for it. What counts as
progress is each call of `beat`. Time in which the process itself was stopped (Ctrl-Z, a frozen container, a laptop
asleep) does not count.
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
from types import FrameType

from fleet.run.peers import Peers
from utils.child_process import command_of

STALLED_EXIT_CODE = 70  # sysexits.h: an internal software error
# Those that wait for a stalled process leave it this much time to say so itself.
WAITING_GRACE_S = 10.0
# Code that runs without giving Python's threads a turn is ended from outside Python.
FROZEN_GRACE_S = 20.0
# Until the first generation a process may be reading a large model from a slow disk.
STARTING_S = 1800.0
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
    """Seconds since the last beat in which the process could run, told in ticks."""

    def __init__(self, tick_s: float, clock: Callable[[], float] = time.monotonic):
        """tick_s: how long a tick should take."""
        self.tick_s, self.clock = tick_s, clock
        self._still_s, self._last_tick_s = 0.0, clock()

    def beat(self) -> None:
        """Begins anew."""
        self._still_s = 0.0

    def tick(self) -> float:
        """The seconds, with those of the tick that has just ended. A tick far longer than it should be was a stop."""
        now_s = self.clock()
        self._still_s += min(now_s - self._last_tick_s, 2 * self.tick_s)
        self._last_tick_s = now_s
        return self._still_s


class Watchdog:
    """Ends the process `timeout_s` seconds after the last `beat`. Does nothing before the first one."""

    def __init__(self, timeout_s: float, rank: int):
        """timeout_s: at least 1."""
        self.timeout_s, self.rank = timeout_s, rank
        self.peers: Peers | None = None
        self._activity, self._limit_s = "", timeout_s
        self._is_watching = False
        self._main_thread_id = threading.main_thread().ident
        self._still = StillTime(min(1.0, timeout_s / 10))
        self._frozen_watch: subprocess.Popen[bytes] | None = None

    def start_with(self, activity: str) -> None:
        """Notes progress before the first generation, where one activity may take STARTING_S."""
        self._note(activity, max(self.timeout_s, STARTING_S))

    def beat(self, activity: str) -> None:
        """Notes progress. activity: what the process now does, for the report."""
        self._note(activity, self.timeout_s)

    def stop(self, *, is_at_end: bool = True) -> None:
        """No longer watches. is_at_end: tells the other processes that this one may be gone from now on."""
        self._is_watching = False
        if self.peers is not None and is_at_end:
            self.peers.say_goodbye()
        if self._frozen_watch is not None and self._frozen_watch.stdin is not None:
            self._frozen_watch.kill()
            self._frozen_watch.wait()
            self._frozen_watch.stdin.close()

    def _note(self, activity: str, limit_s: float) -> None:
        self._activity, self._limit_s, self._is_watching = activity, limit_s, True
        self._still.beat()
        if self._frozen_watch is None:
            # prints every thread's stack where frozen_watch.py ends this process
            faulthandler.enable(file=STDERR)
            self._frozen_watch = subprocess.Popen(
                command_of("fleet.run.frozen_watch", os.getpid(), self.rank, python_flags=("-E", "-S")),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                process_group=0,
            )
            assert self._frozen_watch.stdin is not None
            os.set_blocking(self._frozen_watch.stdin.fileno(), False)
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(self._still.tick_s)
            still_s = self._still.tick()
            if not self._is_watching:
                return
            limit_s = self._limit_s
            self._tell_frozen_watch(f"{limit_s + FROZEN_GRACE_S} {self._activity}\n")
            lost = None
            if self.peers is not None:
                lost = self.peers.first_lost(self._still.tick_s, self.timeout_s + FROZEN_GRACE_S, WAITING_GRACE_S)
            if lost is not None and self._is_watching:
                self._end(f"process {self.rank} ends during {self._activity}, as {lost}")
            if still_s < limit_s:
                continue
            frame = sys._current_frames().get(self._main_thread_id or 0)
            is_waiting = frame is not None and is_of_collective(traceback.extract_stack(frame))
            if still_s > limit_s + WAITING_GRACE_S * is_waiting and self._is_watching:
                self._end(self._where(frame, is_waiting, still_s))

    def _tell_frozen_watch(self, line: str) -> None:
        assert self._frozen_watch is not None and self._frozen_watch.stdin is not None
        try:
            os.write(self._frozen_watch.stdin.fileno(), line.encode())
        except (OSError, ValueError):
            # it is stopped, was ended by somebody, or training has just ended
            return

    def _end(self, what: str) -> None:
        print(f"error: {what}; go on from the last checkpoint with --resume", file=sys.stderr, flush=True)
        os._exit(STALLED_EXIT_CODE)

    def _where(self, frame: FrameType | None, is_waiting: bool, still_s: float) -> str:
        place = traceback.extract_stack(frame)[-1] if frame is not None else None
        where = "an unknown place" if place is None else f"{Path(place.filename).name}:{place.lineno} ({place.name})"
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
    try:
        yield watchdog
    except BaseException:
        # the others hear of it if they do not end for the same reason
        watchdog.stop(is_at_end=False)
        raise
    watchdog.stop()


def is_of_collective(calls: traceback.StackSummary) -> bool:
    """Whether the innermost calls of a stack are those of a library that exchanges data between processes."""
    return any(name in call.filename for call in calls[-4:] for name in COLLECTIVES)
