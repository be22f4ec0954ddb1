"""A reward function that may be the user's own: loaded from its file, bounded in time, every value of it checked.

Owns what a bad value is (its rollout is dropped) and what a broken function is (the run stops). It imports no torch,
because the process of a user's function imports it. rl/algorithm.py decides what a dropped rollout does to others.
"""

import copy
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, Protocol

from utils.user_files import load_user_file

# one value beyond this turns its siblings' rewards into rounding errors: float32 has seven digits
MAX_REWARD = 1e6

# what a function is called with, all by keyword, each a list with one entry a completion, except for the last
KEYWORDS = (
    "prompts", "completions", "completion_ids", "correct_index", "num_candidates", "episode", "trainer_state",
)  # fmt: skip


# those of them that a function could change for others
COPIED = ("prompts", "completion_ids", "episode")


@dataclass(frozen=True)
class CheckedRewards:
    """What one call came to: B values, NaN where one was dropped.

    problem: why the function is broken, and all values are NaN; else None. dropped: the first bad value in words, or
    None.
    """

    values: list[float]
    problem: str | None = None
    dropped: str | None = None


class Reward(Protocol):
    """What training calls: BoundedReward, or the RewardProcess of a file that the user named."""

    __name__: str
    timeout_s: float

    def __call__(self, completions: Sequence[str], **columns: Any) -> CheckedRewards:
        """The values of B completions. Never raises."""
        ...


class BoundedReward:
    """A Python function as a reward that always answers in time, with numbers that are finite or NaN.

    The function runs in a thread of this process. One that a user's file holds has a process of its own instead
    (reward_process.py), because code may insist on a main thread, and can be ended there.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        timeout_s: float = 60.0,
        name: str | None = None,
        *,
        gives_copies: bool = True,
    ):
        """timeout_s: that one call may take. name: of the function in metrics and messages; by default its own.

        gives_copies: whether the function, which may change what it is given, gets each prompt and episode as a copy.
        """
        self.function, self.timeout_s, self.gives_copies = function, timeout_s, gives_copies
        # under this name TRL logs a reward function
        self.__name__ = name or name_of(function)

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
        return found[0] if found else broken(self.__name__, len(completions), late(self.timeout_s))

    def _call(self, completions: Sequence[str], columns: dict[str, Any]) -> CheckedRewards:
        given = columns
        if self.gives_copies:
            # an entry at a time, as siblings share one prompt
            copied = {key: [copy.deepcopy(entry) for entry in columns[key]] for key in COPIED if key in columns}
            given = columns | copied
        return checked_call(self.function, self.__name__, list(completions), given)


def name_of(function: Callable[..., Any]) -> str:
    """The name under which a reward function is logged."""
    return str(getattr(function, "__name__", type(function).__name__))


def checked_call(
    function: Callable[..., Any], name: str, completions: list[str], columns: dict[str, Any]
) -> CheckedRewards:
    """The function's values for B completions. Never raises, whatever the function does or returns.

    A sequence of B numbers is taken, and B sequences of one number each, which is shape (B, 1).
    """
    num_completions = len(completions)
    try:
        returned = function(completions=completions, **columns)
        values = _as_list(returned)
        if values is not None and len(values) == num_completions and not _is_table(values):
            return _checked(values)
        kind = _kind(returned, values)
    # what ends without a word would pass for a hang, so SystemExit and its like count too
    except BaseException as error:
        return broken(name, num_completions, f"raised {describe_error(error)}; correct it")
    wanted = f"a sequence of {num_completions} numbers, one a completion"
    return broken(name, num_completions, f"returned {kind}, but wanted {wanted}; correct it")


def broken(name: str, num_completions: int, reason: str) -> CheckedRewards:
    """What a call of a function that is broken came to. reason: a verb and what follows."""
    return CheckedRewards([math.nan] * num_completions, f"reward function {name} {reason}")


def late(timeout_s: float) -> str:
    """The reason for a function that takes too long."""
    return f"did not return within {timeout_s:g} s; mend it, or raise --reward_timeout_s"


def checked_value(value: Any) -> float:
    """A reward as a finite float, or NaN if it is none: not a real number, not finite, or beyond MAX_REWARD.

    Decimals and numbers of numpy and torch count, and True and False are 1 and 0.

    >>> [checked_value(value) for value in (1, True, 0.5, None, "1", float("inf"), 1e38)]
    [1.0, 1.0, 0.5, nan, nan, nan, nan]
    """
    try:
        number = value.item() if hasattr(value, "item") else value
        reward = float(number) if isinstance(number, Real | Decimal) else math.nan
    # a tensor of several numbers has no item, a whole number may be too large, and a user's class may raise anything
    except Exception:
        return math.nan
    return reward if abs(reward) <= MAX_REWARD else math.nan


def load_reward_function(spec: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names, whose file is run.

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


def _as_list(returned: Any) -> list[Any] | None:
    """The entries of what a function returned; None if it is no sequence."""
    # tensors and arrays have the first; tables and columns of other libraries the second
    for method in ("tolist", "to_numpy"):
        if hasattr(returned, method):
            found = getattr(returned, method)()
            returned = found.tolist() if method == "to_numpy" else found
            break
    is_sequence = isinstance(returned, Sequence) and not isinstance(returned, str | bytes)
    entries = list(returned) if is_sequence else None
    if entries and all(_length(entry) == 1 for entry in entries):
        return [_as_list(entry)[0] for entry in entries]  # type: ignore[index]
    return entries


def _is_table(values: list[Any]) -> bool:
    """Whether every entry is itself a sequence: several numbers a completion."""
    return bool(values) and all(_length(value) is not None for value in values)


def _length(entry: Any) -> int | None:
    """The number of entries of a sequence, of arrays and tensors too; None for what is none."""
    if isinstance(entry, Sequence) and not isinstance(entry, str | bytes):
        return len(entry)
    shape = getattr(entry, "shape", None)
    return int(shape[0]) if isinstance(shape, Sequence) and len(shape) == 1 and hasattr(entry, "tolist") else None


def _kind(returned: Any, values: list[Any] | None) -> str:
    """What was returned, in words."""
    shape = getattr(returned, "shape", None)
    if isinstance(shape, Sequence) and len(shape) != 1:
        return f"a {type(returned).__name__} of shape {tuple(shape)}"
    if values is None:
        return f"a {type(returned).__name__}"
    return f"{len(values)} {'sequences' if _is_table(values) else 'values'}"


def _checked(values: Sequence[Any]) -> CheckedRewards:
    rewards = [checked_value(value) for value in values]
    bad = next((place for place, reward in enumerate(rewards) if math.isnan(reward)), None)
    dropped = None if bad is None else f"{_words(repr, values[bad], 80)} ({type(values[bad]).__name__})"
    return CheckedRewards(rewards, dropped=dropped)


def describe_error(error: BaseException) -> str:
    """Kind, words and place of an exception, in one line."""
    words = _words(str, error, 300)
    calls = traceback.extract_tb(error.__traceback__)
    place = f" ({calls[-1].filename}, line {calls[-1].lineno})" if calls else ""
    return f"{type(error).__name__}{f': {words}' if words else ''}{place}"


def _words(say: Callable[[Any], str], what: Any, max_chars: int) -> str:
    """What `say` makes of it, on one line, without control characters and not longer than max_chars."""
    try:
        text = say(what)
    except BaseException as error:
        return f"(its words cannot be made: {type(error).__name__})"
    flat = " ".join(text[: 20 * max_chars].split())
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in flat)[:max_chars]
