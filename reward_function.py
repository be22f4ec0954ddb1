"""A reward function that may be the user's own: loaded from its file, bounded in time, every value of it checked.

Owns what a bad value is (its rollout is dropped) and what a broken function is (the run stops). It imports no torch,
so a file that cannot be is refused at once. What a dropped rollout does to its siblings is rloo.py's affair.
"""

import inspect
import math
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

from utils.user_files import load_user_file

# one value beyond this turns its siblings' rewards into rounding errors: float32 has seven digits
MAX_REWARD = 1e6

# what a function is called with, all by keyword, each a list with one entry a completion, except for the last
KEYWORDS = (
    "prompts", "completions", "completion_ids", "correct_index", "num_candidates", "episode", "trainer_state",
)  # fmt: skip


@dataclass(frozen=True)
class CheckedRewards:
    """What one call came to: B values, NaN where one was dropped.

    problem: why the function is broken, and all values are NaN; else None. dropped: the first bad value in words, or
    None.
    """

    values: list[float]
    problem: str | None = None
    dropped: str | None = None


class BoundedReward:
    """A reward function that always answers in time, with numbers that are finite or NaN."""

    def __init__(self, function: Callable[..., Any], timeout_s: float = 60.0, name: str | None = None):
        """timeout_s: that one call may take. name: of the function in metrics and messages; by default its own."""
        self.function, self.timeout_s = function, timeout_s
        # under this name TRL logs a reward function
        self.__name__ = name or getattr(function, "__name__", type(function).__name__)

    def __call__(self, completions: Sequence[str], **columns: Any) -> CheckedRewards:
        """The function's values for B completions. Never raises, and takes `timeout_s` at most.

        A function that hangs is left to itself in a thread that ends with the process; one that hangs in C code while
        it holds Python's lock cannot be left. columns: the other KEYWORDS.
        """
        found: list[CheckedRewards] = []
        thread = threading.Thread(
            target=lambda: found.append(self._call(completions, columns)), name=self.__name__, daemon=True
        )
        thread.start()
        thread.join(self.timeout_s)
        if found:
            return found[0]
        reason = f"did not return within {self.timeout_s:g} s; mend it, or raise --reward_timeout_s"
        return self._broken(len(completions), reason)

    def _call(self, completions: Sequence[str], columns: dict[str, Any]) -> CheckedRewards:
        try:
            # a copy, as the function may change what it is given
            returned = self.function(completions=list(completions), **columns)
            values = returned.tolist() if hasattr(returned, "tolist") else returned
            is_sequence = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
            if is_sequence and len(values) == len(completions):
                return _checked(values)
            kind = f"{len(values)} values" if is_sequence else f"a {type(returned).__name__}"
        # a thread that dies without a word would pass for a hang, so SystemExit and its like count too
        except BaseException as error:
            return self._broken(len(completions), f"raised {_in_one_line(error)}; correct it")
        reason = f"returned {kind}, but wanted a sequence of {len(completions)} numbers, one a completion; correct it"
        return self._broken(len(completions), reason)

    def _broken(self, num_completions: int, reason: str) -> CheckedRewards:
        return CheckedRewards([math.nan] * num_completions, f"reward function {self.__name__} {reason}")


def checked_value(value: Any) -> float:
    """A reward as a finite float, or NaN if it is none: not a real number, not finite, or beyond MAX_REWARD.

    Numbers of numpy and torch count, and True and False are 1 and 0.

    >>> [checked_value(value) for value in (1, True, 0.5, None, "1", float("inf"), 1e38)]
    [1.0, 1.0, 0.5, nan, nan, nan, nan]
    """
    try:
        number = value.item() if hasattr(value, "item") else value
        reward = float(number) if isinstance(number, Real) else math.nan
    # a tensor of several numbers has no item; a whole number may be too large for a float
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan
    return reward if abs(reward) <= MAX_REWARD else math.nan


@lru_cache
def load_reward_function(spec: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names, whose file is run once a process.

    Raises ValueError if the spec has another form, the file or the function is missing, or the function cannot be
    called with KEYWORDS.
    """
    module, name = load_user_file(spec, "reward", "path/to/file.py:function")
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
        raise ValueError(f"reward={spec!r}: the file has no function {name}; it has {found}")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward={spec!r} is async, but wanted a plain function; call asyncio.run in it")
    try:
        inspect.signature(function).bind(**dict.fromkeys(KEYWORDS))
    except TypeError as error:
        raise ValueError(
            f"reward={spec!r} cannot be called with the keywords {', '.join(KEYWORDS)} ({error}); take completions by "
            "name, and **columns"
        ) from error
    return function


def _checked(values: Sequence[Any]) -> CheckedRewards:
    rewards = [checked_value(value) for value in values]
    bad = next((place for place, reward in enumerate(rewards) if math.isnan(reward)), None)
    dropped = None if bad is None else f"{repr(values[bad])[:80]} ({type(values[bad]).__name__})"
    return CheckedRewards(rewards, dropped=dropped)


def _in_one_line(error: BaseException) -> str:
    """Kind, words and place of an exception."""
    words = " ".join(str(error).split())[:300]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}{f': {words}' if words else ''} ({place.filename}, line {place.lineno})"
