"""How far a command is: a bar on a terminal, and in a pipe or a log file a plain line now and then."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from utils.plain_text import printable

LINES_PER_COUNT = 10
FIGURES = (
    ("reward", "reward {:.2f}"),
    ("accuracy", "accuracy {:.2f}"),
    ("kl", "KL {:.4f}"),
    ("grad_norm", "gradient norm {:.3g}"),
    ("step_time_s", "{:.2f} s a step"),
)


class StepProgress:
    """A run's optimizer steps on stderr. What is said to it appears above the bar, or as a line of its own."""

    def __init__(self, first_step: int, last_step: int, clock: Callable[[], float] = time.monotonic):
        """first_step: that the run begins or goes on behind; the estimate of the time left counts later steps alone.

        clock: gives seconds.
        """
        self.first_step, self.last_step, self._clock = first_step, last_step, clock
        self._start_s = clock()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=last_step, initial=first_step, dynamic_ncols=True, unit="step")

    def step_done(self, step: int) -> None:
        """Moves the bar to a step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def logged(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Shows a logged step's figures, as far as it has them; None is one that could not be measured."""
        if self._bar is not None:
            if "reward" in figures:
                self._bar.set_postfix_str(", ".join(_in_words(figures, FIGURES[:2])))
            return
        words = [*_in_words(figures, FIGURES), f"{self._time_left(step)} left"]
        self.say(f"step {step}/{self.last_step}: {', '.join(words)}")

    def say(self, text: str) -> None:
        """Prints a text as it is."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> str:
        seconds_a_step = (self._clock() - self._start_s) / max(step - self.first_step, 1)
        return duration(seconds_a_step * (self.last_step - step))


@contextmanager
def count_progress(title: str, total: int, unit: str, *, is_shown: bool = True) -> Iterator[Callable[[int], object]]:
    """Shows how many of `total` are done. Gives the function to call with the number of those that are newly done."""
    if not is_shown:
        yield lambda newly_done: None
    elif sys.stderr.isatty():
        with tqdm(total=total, desc=title, unit=unit, leave=False, dynamic_ncols=True) as bar:
            yield bar.update
    else:
        yield _CountLines(title, total, unit).update


class _CountLines:
    """A line each time that another tenth is done."""

    def __init__(self, title: str, total: int, unit: str):
        self.title, self.total, self.unit = title, total, unit
        self._done, self._start_s = 0, time.monotonic()

    def update(self, newly_done: int) -> None:
        tenths_before = LINES_PER_COUNT * self._done // self.total
        self._done += newly_done
        if LINES_PER_COUNT * self._done // self.total > tenths_before:
            left_s = (time.monotonic() - self._start_s) / self._done * (self.total - self._done)
            print(
                f"{printable(self.title)}: {self._done:,} of {self.total:,} {self.unit}s, {duration(left_s)} left",
                file=sys.stderr,
                flush=True,
            )


def duration(seconds: float) -> str:
    """A length of time in its two largest units.

    >>> [duration(seconds) for seconds in (0.4, 59, 150, 7260)]
    ['0 s', '59 s', '2 min 30 s', '2 h 01 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest_s = divmod(whole, 60)
    return f"{minutes} min {rest_s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _in_words(figures: Mapping[str, float | None], forms: Sequence[tuple[str, str]]) -> list[str]:
    """Those of the figures that have a form; "none" where one could not be measured."""
    written = []
    for name, form in forms:
        if name in figures:
            value = figures[name]
            written.append(form.format(value) if value is not None else re.sub(r"{.*}", "none", form))
    return written
