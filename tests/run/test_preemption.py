"""When a signal is a second one; tests/test_interruptions.py sends them to whole runs."""

import signal
from types import SimpleNamespace
from typing import NoReturn

import pytest

from fleet.run import preemption
from fleet.run.preemption import Preemption


@pytest.mark.parametrize(
    ("at_s", "exit_code"), [([5.0, 5.0, 6.0], None), ([5.0, 6.1], 143), ([5.0, 5.9, 6.1], 143)], ids=str
)
def test_a_signal_within_a_second_is_a_launchers_copy_and_a_later_one_ends_the_process(
    at_s: list[float], exit_code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    clock = iter(at_s)
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(preemption.os, "_exit", leave)
    stopper, ended_with = Preemption(trainer=None), None
    stopper.on_train_begin(None, None, None)
    try:
        for _ in at_s:
            signal.raise_signal(signal.SIGTERM)
    except SystemExit as ended:
        ended_with = ended.code
    finally:
        stopper.is_stopping = True  # or the first signal would have its usual effect now
        stopper.on_train_end(None, None, None)
    assert ended_with == exit_code and next(clock, None) is None
