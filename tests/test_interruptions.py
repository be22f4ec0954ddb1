"""Runs that are killed, told to stop, or left waiting: what they save, how they end, and how they go on."""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fleet.rl.checkpoints import find_damage, list_checkpoints
from fleet.run.preemption import SAME_SIGNAL_S
from fleet.run_folder import read_jsonl
from tests import HANG_S
from tests.processes import ZERO3, Rank, run_ranks, start, start_ranks
from tests.test_resume import QUICK, entire

pytestmark = pytest.mark.slow

# the everyday run takes a sample of the instants; FLEET_KILLS=200 goes looking for more
NUM_KILLS = int(os.environ.get("FLEET_KILLS", "20"))


def wait_until(is_so: Callable[[], bool], ranks: list[Rank], timeout_s: float = HANG_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            for rank in ranks:
                rank.process.kill()
            raise AssertionError("\n".join(rank.output[-3000:] for rank in ranks))
        time.sleep(0.005)


def said(rank: Rank, words: str) -> bool:
    return words in rank.output


def num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest_step(run: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in list_checkpoints(run)), default=0)


@pytest.mark.parametrize(
    ("num_processes", "zero3", "num_kills"),
    [(1, False, NUM_KILLS), pytest.param(2, True, max(1, NUM_KILLS // 7), marks=pytest.mark.exhaustive)],
)
def test_killed_at_random_instants_a_run_still_ends_in_the_same_bits(
    num_processes: int, zero3: bool, num_kills: int, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    arguments = [*QUICK, "--output_dir", str(killed), "--train_steps"]
    instants = random.Random(0)
    for _ in range(num_kills):
        saved = newest_step(killed)
        ranks = start_ranks(tmp_path, [*arguments, "999", "--resume", "auto"], num_processes, zero3=zero3)
        # from the first step on, over the time of a few steps and their saves
        wait_until(partial(said, ranks[0], "/999: "), ranks)
        time.sleep(instants.uniform(0, 1.5))
        # stopped first, so that none notices that another is gone and ends by itself
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for rank in ranks:
                os.kill(rank.pid, number)
        assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * num_processes, ranks[0].output[-2000:]
        assert newest_step(killed) >= saved, "nothing that was committed is lost"
        assert [find_damage(path) for path in list_checkpoints(killed)] == [None] * len(list_checkpoints(killed))
        assert newest_step(killed) >= num_steps(killed) - 2, "no more is lost than the step that was being saved"
    steps = str(newest_step(killed) + 1)
    run_ranks(tmp_path, [*arguments, steps, "--resume"], num_processes, zero3=zero3)
    whole = tmp_path / "whole"
    run_ranks(tmp_path, [*QUICK, "--output_dir", str(whole), "--train_steps", steps], num_processes, zero3=zero3)
    assert entire(killed / f"checkpoint-{steps}") == entire(whole / f"checkpoint-{steps}")


def signal_during(phase: str, ranks: list[Rank], numbers: list[int], which: list[Rank]) -> None:
    """Sends the signals once every rank has said that it is in `phase` of its second step."""
    wait_until(lambda: all(rank.output.count(f"[{phase}]") >= 2 for rank in ranks), ranks)
    for number in numbers:
        for rank in which:
            os.kill(rank.pid, number)


@pytest.mark.parametrize(
    ("phase", "number", "who"),
    [
        ("generation", signal.SIGTERM, "one"),
        pytest.param("rewards", signal.SIGTERM, "all", marks=pytest.mark.exhaustive),
        ("a save", signal.SIGINT, "one"),
        pytest.param("the training pass", signal.SIGINT, "all", marks=pytest.mark.exhaustive),
    ],
)
def test_told_to_stop_all_ranks_finish_the_step_save_and_exit_75(
    phase: str, number: int, who: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--train_steps"]
    ranks = start_ranks(tmp_path, [*arguments, "999"], 2, zero3=True, target="tests.speaking_training")
    signal_during(phase, ranks, [number], ranks[1:] if who == "one" else ranks)
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].output[-3000:]
    steps = newest_step(run)
    assert steps == num_steps(run) and find_damage(run / f"checkpoint-{steps}") is None
    assert f"stopped: told to stop: saved step {steps} of 999 in {run}" in ranks[0].output
    assert not (run / "final").exists() and not (run / "unfinished").exists()
    if phase == "generation":
        run_ranks(tmp_path, [*arguments, str(steps + 1), "--resume"], 2, zero3=True)
        whole = tmp_path / "whole"
        flags = [*QUICK, "--output_dir", str(whole), "--train_steps", str(steps + 1)]
        run_ranks(tmp_path, flags, 2, zero3=True)
        assert entire(run / f"checkpoint-{steps + 1}") == entire(whole / f"checkpoint-{steps + 1}")


def test_told_to_stop_in_the_middle_of_a_generation_its_steps_are_finished_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--num_iterations", "4", "--train_steps", "999"]
    ranks = start_ranks(tmp_path, arguments, target="tests.speaking_training")
    # the second pass is a generation's second step of four, after which a save is due and cannot be
    signal_during("the training pass", ranks, [signal.SIGTERM], ranks)
    assert ranks[0].wait() == 75, ranks[0].output[-3000:]
    steps = newest_step(run)
    assert steps > 0 and steps % 4 == 0 and steps == num_steps(run)
    assert f"saved step {steps} of 999" in ranks[0].output


def test_told_to_stop_during_an_evaluation_that_is_finished_and_the_next_step_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--eval_steps", "1", "--eval_episodes", "8", "--train_steps", "999"]
    ranks = start_ranks(tmp_path, arguments, target="tests.speaking_training")
    signal_during("evaluation", ranks, [signal.SIGTERM], ranks)
    assert ranks[0].wait() == 75, ranks[0].output[-3000:]
    steps = newest_step(run)
    assert f"saved step {steps} of 999" in ranks[0].output
    evaluated = [document["step"] for document in read_jsonl(run / "evaluations.jsonl")]
    assert evaluated in (list(range(steps)), list(range(steps + 1))), (
        "each once, the last where it came before the stop"
    )
    assert find_damage(run / f"checkpoint-{steps}") is None


def test_a_run_that_is_ended_while_it_writes_its_results_is_finished_by_a_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--train_steps", "1"]
    ranks = start_ranks(tmp_path, arguments, target="tests.speaking_training")
    wait_until(partial(said, ranks[0], "[writing the results]"), ranks)
    os.kill(ranks[0].pid, signal.SIGTERM)
    # training is over, so the signal does what it always does, unless the results were written first
    assert ranks[0].wait() in (-signal.SIGTERM, 0), ranks[0].output[-3000:]
    assert find_damage(run / "checkpoint-1") is None
    run_ranks(tmp_path, [*arguments, "--resume"], 1)
    assert (run / "report.html").is_file() and (run / "final" / "model.safetensors").is_file()
    assert not (run / "unfinished").exists() and not list(run.glob("*.lock"))


def test_workers_that_load_pictures_outlive_a_signal_to_their_processs_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the launcher's 30 s may be too few for a step on a busy machine
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(HANG_S))
    run, log = tmp_path / "run", tmp_path / "log"
    flags = [*QUICK, "--output_dir", str(run), "--train_steps", "999", "--dataloader_num_workers", "2"]
    process = start(ZERO3, ["training.py", *flags], log)
    deadline_s = time.monotonic() + HANG_S
    while process.poll() is None and num_steps(run) < 2:
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.1)
    # the launcher signals each rank's group, as a scheduler does
    process.send_signal(signal.SIGTERM)
    process.wait(HANG_S)
    assert "stopped: told to stop: saved step" in log.read_text(), log.read_text()[-3000:]
    assert find_damage(run / f"checkpoint-{newest_step(run)}") is None


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    arguments = [*QUICK, "--output_dir", str(tmp_path / "run"), "--train_steps", "999"]
    (rank,) = start_ranks(tmp_path, [*arguments, "0:rewards:hang"], target="tests.speaking_training")
    wait_until(lambda: rank.output.count("[rewards]") == 2, [rank])

    def has_ended() -> bool:
        # until two are further apart than a launcher's copy of the same signal
        os.kill(rank.pid, signal.SIGTERM)
        rank.process.join(SAME_SIGNAL_S)
        return not rank.process.is_alive()

    wait_until(has_ended, [rank])
    assert rank.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(
            "1:rewards:raise", "error: process 1: ValueError: a fault of the test's", marks=pytest.mark.exhaustive
        ),
        pytest.param(
            "1:generation:hang", "error: process 1 has stalled in speaking_training.py", marks=pytest.mark.exhaustive
        ),
        ("0:the training pass:hang", "error: process 0 has stalled in speaking_training.py"),
        pytest.param("1:rewards:kill", "Signal 9 (SIGKILL) received by PID", marks=pytest.mark.exhaustive),
        pytest.param("1:a save:exit", "exitcode  : 9", marks=pytest.mark.exhaustive),
    ],
)
def test_when_a_rank_raises_dies_or_stalls_all_end_and_say_which(fault: str, words: str, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    # a step takes a second, or several on a busy machine
    limits = ["--step_timeout_s", "20"]
    flags = [*QUICK, "--output_dir", str(run), "--train_steps", "999", *limits, fault]
    process = start(ZERO3, ["tests/speaking_training.py", *flags], log)
    deadline_s = time.monotonic() + HANG_S
    while process.poll() is None and "[fault]" not in log.read_text():
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.1)
    assert process.wait(HANG_S) != 0
    said_last = log.read_text()
    assert words in said_last, said_last[-3000:]
    blamed = [line for line in said_last.splitlines() if "has stalled in" in line]
    assert blamed == [line for line in blamed if line.startswith(words)], "nobody else is blamed"
    assert [find_damage(path) for path in list_checkpoints(run)] == [None] * newest_step(run)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(
            "1:stop",
            "error: process 0 ends during the loading of the model, as process 1 has given no sign for",
            marks=pytest.mark.exhaustive,
        ),
        ("1:kill", "error: process 0"),
        pytest.param("0:kill", "error: process 1", marks=pytest.mark.exhaustive),
    ],
)
def test_a_rank_that_is_lost_before_the_first_generation_ends_the_others(
    fault: str, words: str, tmp_path: Path
) -> None:
    limits = ["--step_timeout_s", "10"]
    flags = [*QUICK, "--output_dir", str(tmp_path / "run"), "--train_steps", "1", *limits, fault]
    ranks = start_ranks(tmp_path, flags, 2, zero3=True, target="tests.early_fault")
    lost, other = ranks if fault.startswith("0") else ranks[::-1]
    wait_until(partial(said, lost, "[loading]"), ranks)
    try:
        assert other.wait() in (1, 70), other.output[-3000:]
    finally:
        lost.process.kill()
    assert [line for line in other.output.splitlines() if line.startswith(words)], other.output[-3000:]


@pytest.mark.exhaustive  # test_watchdog.py counts the time by a clock of its own
def test_a_process_that_was_stopped_for_long_goes_on_when_it_is_continued(tmp_path: Path) -> None:
    limits = ["--step_timeout_s", "20"]
    flags = [*QUICK, "--output_dir", str(tmp_path / "run"), "--train_steps", "12", *limits]
    (rank,) = start_ranks(tmp_path, flags, target="tests.speaking_training")
    wait_until(lambda: rank.output.count("[rewards]") >= 2, [rank])
    os.kill(rank.pid, signal.SIGSTOP)
    # longer than a step may take
    time.sleep(22)
    os.kill(rank.pid, signal.SIGCONT)
    assert rank.wait() == 0, rank.output[-3000:]


ONE_OR_TWO = [(1, False), pytest.param(2, True, marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize(("num_processes", "zero3"), ONE_OR_TWO)
def test_a_second_run_in_a_folder_is_refused_and_goes_on_once_the_first_is_killed(
    num_processes: int, zero3: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--train_steps", "999"]
    first = start_ranks(tmp_path, arguments, num_processes, zero3=zero3)
    try:
        wait_until(lambda: newest_step(run) >= 1, first)
        (second,) = start_ranks(tmp_path, [*arguments, "--resume", "auto"])
        assert second.wait() == 2
        last = second.output.strip().splitlines()[-1]
        assert f"output_dir={run} is in use: process {first[0].pid} on " in last and "trains in it" in last
    finally:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for rank in first:
                os.kill(rank.pid, number)
    # a killed process is there until the system has taken it away
    assert [rank.wait() for rank in first] == [-signal.SIGKILL] * num_processes
    third = start_ranks(tmp_path, [*arguments, "--resume", "auto"], num_processes, zero3=zero3)
    steps = newest_step(run)
    wait_until(lambda: newest_step(run) > steps, third)
    os.kill(third[-1].pid, signal.SIGTERM)
    assert [rank.wait() for rank in third] == [75] * num_processes, third[0].output[-3000:]
    assert f"process {first[0].pid} on " in third[0].output and "its lock is taken over" in third[0].output
    assert not list(run.glob("*.lock"))
    lines = [line["step"] for line in read_jsonl(run / "metrics.jsonl")]
    assert lines == list(range(1, newest_step(run) + 1)), "each step once"


@pytest.mark.parametrize(("num_processes", "zero3"), ONE_OR_TWO)
def test_a_run_whose_folder_was_taken_over_stops_and_writes_there_no_more(
    num_processes: int, zero3: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(run), "--train_steps", "999"]
    ranks = start_ranks(tmp_path, arguments, num_processes, zero3=zero3)
    wait_until(lambda: newest_step(run) >= 1, ranks)
    (run / "run-2.lock").write_text('{"host": "node17", "pid": 4711, "since": "2026-11-26 09:00:00"}')
    assert [rank.wait() for rank in ranks] == [1] * num_processes, ranks[0].output[-3000:]
    (said,) = [line for line in ranks[0].output.splitlines() if line.startswith("error: ")]
    assert "was taken over by process 4711 on node17 (since 2026-11-26 09:00:00)" in said
    assert "let the other one go on, or stop it" in said
    assert [find_damage(path) for path in list_checkpoints(run)] == [None] * len(list_checkpoints(run))
    assert (run / "run-2.lock").exists()
