"""Progress of a command: a bar on a terminal, and in a pipe or a log file a plain line now and then."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
    """A run's optimizer steps on stderr. Texts appear above the bar, or as lines of their own."""

    def __init__(self, first_step: int, last_step: int, clock: Callable[[], float] = time.monotonic):
        """first_step: the last one before this process began, from which the time left is estimated. clock: seconds."""
        self.first_step, self.last_step, self._clock = first_step, last_step, clock
        self._start_s = clock()
        # None: no bar where stderr is no terminal
        self._bar = tqdm(total=last_step, initial=first_step, dynamic_ncols=True, unit="step", disable=None)

    def step_done(self, step: int) -> None:
        """Moves the bar to a step."""
        self._bar.update(step - self._bar.n)

    def logged(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Shows those of FIGURES that a logged step has; a figure of None could not be measured."""
        if self._bar.disable:
            seconds_a_step = (self._clock() - self._start_s) / max(step - self.first_step, 1)
            left = f"{duration(seconds_a_step * (self.last_step - step))} left"
            self.say(f"step {step}/{self.last_step}: {', '.join([*_in_words(figures, FIGURES), left])}")
        elif "reward" in figures:
            self._bar.set_postfix_str(", ".join(_in_words(figures, FIGURES[:2])))

    def say(self, text: str) -> None:
        """Prints a text as it is."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


@contextmanager
def count_progress(title: str, total: int, unit: str, *, is_shown: bool = True) -> Iterator[Callable[[int], object]]:
    """Shows how many of `total` are done. Yields the function to call with each number of newly done ones."""
    if not is_shown:
        yield lambda newly_done: None
    elif sys.stderr.isatty():
        with tqdm(total=total, desc=title, unit=unit, leave=False, dynamic_ncols=True) as bar:
            yield bar.update
    else:
        yield _tenths_in_lines(title, total, unit)


def _tenths_in_lines(title: str, total: int, unit: str) -> Callable[[int], None]:
    """A function that prints a line each time that another tenth is done."""
    done, start_s = 0, time.monotonic()

    def update(newly_done: int) -> None:
        nonlocal done
        tenths_before = LINES_PER_COUNT * done // total
        done += newly_done
        if LINES_PER_COUNT * done // total > tenths_before:
            left_s = (time.monotonic() - start_s) / done * (total - done)
            line = f"{printable(title)}: {done:,} of {total:,} {unit}s, {duration(left_s)} left"
            print(line, file=sys.stderr, flush=True)

    return update


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
    """The figures that have a form, in it; "none" for a figure that could not be measured."""
    given = [(form, figures[name]) for name, form in forms if name in figures]
    return [re.sub(r"{.*}", "none", form) if value is None else form.format(value) for form, value in given]
