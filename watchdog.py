"""Watchdog: ends a process that makes no progress, with the reason in a line, so that no job hangs for ever.

Where one process stalls, the others wait for it in a collective: the one that stalls ends first and says where, and
its launcher ends the rest. A process that is stopped or lost is reported by those that wait for it. What counts as
progress is each call of `beat`.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

STALLED_EXIT_CODE = 70  # sysexits.h: an internal software error
# Those that wait for a stalled process leave it this much time to say so itself.
WAITING_GRACE_S = 10.0
# Code that runs without giving Python's threads a turn is ended from outside Python.
FROZEN_GRACE_S = 20.0
COLLECTIVES = (
    "torch/distributed/",
    "torch/autograd/graph.py",  # a backward pass, which reduces gradients as it goes
    "deepspeed/comm/",
    "deepspeed/runtime/zero/",
    "deepspeed/utils/nvtx.py",
    "accelerate/utils/operations.py",
)


class Watchdog:
    """Ends the process `timeout_s` seconds after the last `beat`. Does nothing before the first one."""

    def __init__(self, timeout_s: float, rank: int):
        """timeout_s: at least 1."""
        self.timeout_s, self.rank = timeout_s, rank
        self._activity = ""
        self._last_beat_s: float | None = None
        self._main_thread_id = threading.main_thread().ident
        self._thread: threading.Thread | None = None

    def beat(self, activity: str) -> None:
        """Notes progress. activity: what the process now does, for the report."""
        self._activity, self._last_beat_s = activity, time.monotonic()
        faulthandler.dump_traceback_later(self.timeout_s + FROZEN_GRACE_S, exit=True)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """No longer watches."""
        self._last_beat_s = None
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.timeout_s / 10))
            last_beat_s = self._last_beat_s
            if last_beat_s is None:
                continue
            still_s = time.monotonic() - last_beat_s
            if still_s < self.timeout_s:
                continue
            frame = sys._current_frames().get(self._main_thread_id or 0)
            is_waiting = frame is not None and _is_in_collective(frame)
            if still_s > self.timeout_s + WAITING_GRACE_S * is_waiting:
                print(self._report(frame, is_waiting, still_s), file=sys.stderr, flush=True)
                os._exit(STALLED_EXIT_CODE)

    def _report(self, frame: FrameType | None, is_waiting: bool, still_s: float) -> str:
        place = traceback.extract_stack(frame)[-1] if frame is not None else None
        where = "an unknown place" if place is None else f"{Path(place.filename).name}:{place.lineno} ({place.name})"
        how = "waits for another process, which has stalled or is lost," if is_waiting else "has stalled"
        return (
            f"error: process {self.rank} {how} in {where} during {self._activity}: no progress for {still_s:.0f} s "
            "(--step_timeout_s); go on from the last checkpoint with --resume"
        )


def _is_in_collective(frame: FrameType) -> bool:
    """Whether the innermost calls of a stack are those of a library that exchanges data between processes."""
    innermost = traceback.extract_stack(frame)[-4:]
    return any(name in call.filename for call in innermost for name in COLLECTIVES)
