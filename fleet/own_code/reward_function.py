"""A user's reward function: loaded from its file, every value checked.

Owns what counts as a bad value (its rollout is dropped) and as a broken function (the run stops). rl/algorithm.py
decides what a dropped rollout does to its siblings. Imports no torch, as the process of a user's function imports it.
"""

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from utils.user_files import load_user_file

# a value beyond this turns its siblings' rewards into rounding errors: float32 has seven digits
MAX_REWARD = 1e6

# A function's arguments, all by keyword: lists with an entry for each completion, and the trainer's state. One that
# takes neither `verdict` nor every keyword goes without.
KEYWORDS = (
    "prompts", "completions", "completion_ids", "correct_index", "num_candidates", "episode", "verdict",
    "trainer_state",
)  # fmt: skip


@dataclass(frozen=True)
class CheckedRewards:
    """The result of one call."""

    values: list[float]  # B, NaN where one is dropped
    problem: str | None = None  # the reason why the function is broken; all values are NaN
    dropped: str | None = None  # the first bad value, in words


def name_of(function: Callable[..., Any]) -> str:
    """The name under which TRL logs a reward function."""
    return str(getattr(function, "__name__", type(function).__name__))


def checked_call(
    function: Callable[..., Any], name: str, completions: list[str], columns: dict[str, Any]
) -> CheckedRewards:
    """The function's values for B completions; it may return shape (B,) or (B, 1). Never raises."""
    num_completions = len(completions)
    try:
        returned = function(completions=completions, **_taken(function, columns))
        values, are_sequences = _column(returned)
        if values is not None and len(values) == num_completions and not are_sequences:
            return _checked(values)
        kind = f"a {type(returned).__name__}"
        shape = getattr(returned, "shape", None)
        if isinstance(shape, Sequence) and len(shape) != 1:
            kind += f" of shape {tuple(shape)}"
        elif values is not None:
            kind = f"{len(values)} {'sequences' if are_sequences else 'values'}"
    # SystemExit and its like count too: to the caller, a function that ends without a word would have hung
    except BaseException as error:
        return broken(name, num_completions, f"raised {describe_error(error)}; correct it")
    wanted = f"a sequence of {num_completions} numbers, one a completion"
    return broken(name, num_completions, f"returned {kind}, but wanted {wanted}; correct it")


def broken(name: str, num_completions: int, reason: str) -> CheckedRewards:
    """The result of a broken function's call. reason: a verb and what follows."""
    return CheckedRewards([math.nan] * num_completions, f"reward function {name} {reason}")


def cannot_cross(error: BaseException) -> str:
    """The reason for a function whose process cannot be given its arguments."""
    return f"cannot be given its columns: {describe_error(error)}; let episodes hold plain data"


def checked_value(value: Any) -> float:
    """A reward as a finite float; NaN unless it is a real number, finite, and within MAX_REWARD of 0.

    Decimals and numbers of numpy and torch count. True and False are 1 and 0.

    >>> [checked_value(value) for value in (1, True, 0.5, None, "1", float("inf"), 1e38)]
    [1.0, 1.0, 0.5, nan, nan, nan, nan]
    """
    try:
        number = value.item() if hasattr(value, "item") else value
        reward = float(number) if isinstance(number, Real | Decimal) else math.nan
    # a tensor of several numbers has no item, an integer may be too large, and a user's class may raise anything
    except Exception:
        return math.nan
    return reward if abs(reward) <= MAX_REWARD else math.nan


def load_reward_function(spec: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names. Runs that file. Raises ValueError if none takes KEYWORDS."""
    module, name = load_user_file(spec, "reward", "path/to/file.py:function")
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
        raise ValueError(f"reward={spec!r}: the file has no function {name}; it has {found}")
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"reward={spec!r} is async, but wanted a plain function; call asyncio.run in it")
    try:
        inspect.signature(function).bind(**_taken(function, dict.fromkeys(KEYWORDS)))
    except TypeError as error:
        raise ValueError(
            f"reward={spec!r} cannot be called with the keywords {', '.join(KEYWORDS)} ({error}); take completions by "
            "name, and **columns"
        ) from error
    return function


def _taken(function: Callable[..., Any], columns: dict[str, Any]) -> dict[str, Any]:
    """The columns, without the verdicts if the function does not take them."""
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: column for name, column in columns.items() if takes_all or name != "verdict" or name in parameters}


def _column(returned: Any) -> tuple[list[Any] | None, bool]:
    """(the entries, with sequences of one as their entry; True if each is still a sequence)."""
    values = _entries(returned)
    rows = [_entries(value) for value in values or ()]
    while rows and all(row is not None and len(row) == 1 for row in rows):
        values = [row[0] for row in rows if row is not None]
        rows = [_entries(value) for value in values]
    return values, bool(rows) and None not in rows


def _entries(value: Any) -> list[Any] | None:
    """The entries of a sequence, a tensor, an array, or another library's column or table; None for anything else."""
    if hasattr(value, "to_numpy") and not hasattr(value, "tolist"):
        value = value.to_numpy()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def _checked(values: Sequence[Any]) -> CheckedRewards:
    rewards = [checked_value(value) for value in values]
    bad = next((place for place, reward in enumerate(rewards) if math.isnan(reward)), None)
    dropped = None if bad is None else f"{_words(repr, values[bad], 80)} ({type(values[bad]).__name__})"
    return CheckedRewards(rewards, dropped=dropped)


def describe_error(error: BaseException) -> str:
    """An exception's type, words and place, in one line."""
    words = _words(str, error, 300)
    calls = traceback.extract_tb(error.__traceback__)
    place = f" ({calls[-1].filename}, line {calls[-1].lineno})" if calls else ""
    return f"{type(error).__name__}{f': {words}' if words else ''}{place}"


def _words(say: Callable[[Any], str], what: Any, max_chars: int) -> str:
    """`say(what)` on one line of at most max_chars, without control characters."""
    try:
        text = say(what)
    except BaseException as error:
        return f"(its words cannot be made: {type(error).__name__})"
    flat = " ".join(text[: 20 * max_chars].split())
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in flat)[:max_chars]
