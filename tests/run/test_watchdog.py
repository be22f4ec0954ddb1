"""What counts as stalled, stopped and lost: time in ticks, signs of other processes, and code that holds the lock."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.run.peers import GOODBYE, SIGN, Peer, Peers
from fleet.run.watchdog import StillTime
from tests import HANG_S

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).resolve().parents[2]


def test_still_time_counts_ticks_and_not_the_time_in_which_the_process_was_stopped() -> None:
    # by tick: what the clock shows
    clock = iter([0.0, 1.0, 2.1, 3.0, 3603.0, 3604.0, 3605.0, 3606.0])
    still = StillTime(1.0, lambda: next(clock))
    assert [still.tick() for _ in range(3)] == pytest.approx([1.0, 2.1, 3.0])
    assert still.tick() == pytest.approx(5.0), "an hour's stop counts as two ticks"
    assert still.tick() == pytest.approx(6.0)
    still.beat()
    assert [still.tick(), still.tick()] == pytest.approx([1.0, 2.0])


@pytest.fixture
def pair() -> "tuple[Peers, socket.socket]":
    own, other = socket.socketpair()
    return Peers([Peer(3, own)]), other


def lost_after(peers: Peers, num_ticks: int) -> list[str | None]:
    return [peers.first_lost(1.0, silence_s=5.0, closed_s=2.0) for _ in range(num_ticks)]


def test_a_process_that_gives_signs_is_not_lost(pair: "tuple[Peers, socket.socket]") -> None:
    peers, other = pair
    for _ in range(20):
        other.send(SIGN)
        assert lost_after(peers, 3) == [None] * 3


def test_a_silent_process_is_lost(pair: "tuple[Peers, socket.socket]") -> None:
    peers, other = pair
    assert lost_after(peers, 5) == [None] * 5
    assert lost_after(peers, 1) == ["process 3 has given no sign for 6 s: it is stopped or lost"]
    other.send(SIGN)
    assert lost_after(peers, 5) == [None] * 5, "one that goes on is there again"


def test_a_process_whose_connection_closes_has_ended(pair: "tuple[Peers, socket.socket]") -> None:
    peers, other = pair
    other.close()
    assert lost_after(peers, 4) == [None, None, None, "process 3 has ended"]


def test_a_process_that_said_goodbye_may_end(pair: "tuple[Peers, socket.socket]") -> None:
    peers, other = pair
    other.send(GOODBYE)
    other.close()
    assert lost_after(peers, 20) == [None] * 20


HOLDS_THE_LOCK = """
import faulthandler, os, re, subprocess
from utils.child_process import command_of
faulthandler.enable(file=2)
command = command_of("fleet.run.frozen_watch", os.getpid(), 3, python_flags=("-E", "-S"))
watch = subprocess.Popen(command, stdin=subprocess.PIPE)
os.write(watch.stdin.fileno(), b"30 reading\\n1 counting\\n")
re.match("(a*)*b", "a" * 60)
"""


def test_code_that_holds_the_lock_is_ended_with_a_line_and_its_stack() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_THE_LOCK], cwd=REPOSITORY, text=True, capture_output=True, timeout=HANG_S
    )
    assert done.returncode == -6
    assert "error: process 3 has stalled during counting, in code that holds Python's lock" in done.stderr
    assert 'File "<string>", line 8 in <module>' in done.stderr
