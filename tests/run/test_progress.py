"""How far a run is: plain lines in a log file, a bar on a terminal, and an estimate that counts what this run did."""

import io
import sys

import pytest

from fleet.progress import StepProgress, count_progress, duration

FIGURES = {"reward": 0.5, "accuracy": 0.25, "kl": 0.00123, "grad_norm": 12.345, "step_time_s": 1.5, "entropy": 0.1}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_logged_step_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = StepProgress(0, 60, clock)
    clock.seconds = 24.0
    progress.step_done(12)
    progress.logged(12, FIGURES)
    progress.close()
    assert capsys.readouterr().err == (
        "step 12/60: reward 0.50, accuracy 0.25, KL 0.0012, gradient norm 12.3, 1.50 s a step, 1 min 36 s left\n"
    )


def test_what_was_not_measured_is_none_and_what_a_step_has_not_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress(0, 2, Clock())
    progress.logged(1, {"reward": None, "accuracy": 0.0, "grad_norm": None})
    progress.logged(2, {"grad_norm": 1.0, "step_time_s": 0.25})
    assert capsys.readouterr().err.splitlines() == [
        "step 1/2: reward none, accuracy 0.00, gradient norm none, 0 s left",
        "step 2/2: gradient norm 1, 0.25 s a step, 0 s left",
    ]


def test_a_resumed_run_estimates_by_its_own_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    progress = StepProgress(50, 60, clock)
    clock.seconds = 10.0
    progress.logged(52, {})
    # two steps took 10 s, so the other eight take 40
    assert capsys.readouterr().err == "step 52/60: 40 s left\n"
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = StepProgress(50, 60)
    progress.step_done(52)
    assert (progress._bar.initial, progress._bar.n) == (50, 52)
    progress.close()
    assert "52/60" in terminal.getvalue()


def test_a_terminal_has_a_bar_with_the_latest_figures_and_words_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = StepProgress(0, 60)
    progress.step_done(1)
    progress.logged(1, FIGURES)
    progress.say("[bold]a table[/bold]")
    progress.close()
    assert "1/60" in terminal.getvalue() and "reward 0.50, accuracy 0.25" in terminal.getvalue()
    assert "[bold]a table[/bold]\n" in terminal.getvalue()
    assert "gradient norm" not in terminal.getvalue()


def test_counts_are_a_line_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with count_progress("scoring toy", 200, "answer") as note:
        for _ in range(100):
            note(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"scoring toy: {done} of 200 answers" for done in range(20, 201, 20)
    ]
    assert lines[-1].endswith(", 0 s left")


def test_a_count_is_shown_by_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    with count_progress("scoring toy", 2, "answer", is_shown=False) as note:
        note(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (3600, "1 h 00 min"), (90_000, "25 h 00 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
