"""A user's reward function: what of it is loaded, which of its values count, and how a broken one is told."""

import contextlib
import math
import re
import sys
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from fleet.command import command_line
from fleet.command.options import own_code, parse_options
from fleet.command.output_dir import paths_read
from fleet.command.preflight import own_reward
from fleet.errors import RunStopped, UsageError
from fleet.own_code.reward_function import KEYWORDS, checked_call, checked_value, load_reward_function, name_of
from fleet.verdicts import Verdict

pytestmark = pytest.mark.fast

NUMBERS = {
    "0": (0, 0.0),
    "a whole number": (-3, -3.0),
    "a fraction": (0.25, 0.25),
    "a ratio": (Fraction(1, 4), 0.25),
    "a decimal": (Decimal("0.5"), 0.5),
    "true": (True, 1.0),
    "false": (False, 0.0),
    "numpy's float32": (np.float32(0.5), 0.5),
    "numpy's int64": (np.int64(7), 7.0),
    "numpy's bool": (np.bool_(True), 1.0),
    "an array of one": (np.array([0.5]), 0.5),
    "the largest": (1e6, 1e6),
    "the smallest": (-1e6, -1e6),
}
NO_NUMBERS = {
    "nothing": None,
    "inf": math.inf,
    "-inf": -math.inf,
    "NaN": math.nan,
    "numpy's NaN": np.float32("nan"),
    "1e38": 1e38,
    "a little too large": 1_000_001.0,
    "a little too small": -1_000_001.0,
    "a whole number that no float holds": 10**400,
    "a text": "1.0",
    "bytes": b"1",
    "complex": 1 + 0j,
    "numpy's complex": np.complex64(1),
    "a decimal that is none": Decimal("sNaN"),
    "a list": [1.0],
    "an array of two": np.array([0.5, 0.5]),
    "a function": len,
}


@pytest.mark.parametrize(("value", "reward"), NUMBERS.values(), ids=NUMBERS.keys())
def test_a_number_counts(value: Any, reward: float) -> None:
    assert checked_value(value) == reward
    assert type(checked_value(value)) is float


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS.keys())
def test_what_is_no_number_drops_its_rollout_alone(value: Any) -> None:
    checked = checked_call(lambda **columns: [1.0, value, 0.5], "score", ["a", "b", "c"], {})
    assert checked.problem is None
    assert (checked.values[0], checked.values[2]) == (1.0, 0.5) and math.isnan(checked.values[1])
    assert checked.dropped is not None and checked.dropped.endswith(f"({type(value).__name__})")


class Column:
    """Values as libraries of tables have them: no sequence, and an array on demand."""

    def __init__(self, values: np.ndarray):
        self.shape, self.to_numpy = values.shape, lambda: values


SEQUENCES = {
    "tuple": (0.0, 1.0, 2.0),
    "array": np.arange(3, dtype=np.float32),
    "array of objects": np.array([0, 1.0, True + 1], dtype=object),
    "range": range(3),
    "deque": deque([0, 1, 2]),
    "array of shape (3, 1)": np.arange(3).reshape(3, 1),
    "lists of one": [[0.0], [1.0], [2.0]],
    "arrays of one": [np.array([0.0]), np.array([1.0]), np.array([2.0])],
    "arrays of no axis": [np.array(0.0), np.array(1.0), np.array(2.0)],
    "a column of a table": Column(np.arange(3)),
    "a table of one column": Column(np.arange(3).reshape(3, 1)),
}


@pytest.mark.parametrize("values", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_any_sequence_of_numbers_is_accepted(values: Any) -> None:
    assert checked_call(lambda **columns: values, "score", ["a", "b", "c"], {}).values == [0.0, 1.0, 2.0]


def raises(error: BaseException) -> NoReturn:
    raise error


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError


WANTED = "but wanted a sequence of 3 numbers, one a completion; correct it"
BROKEN = {
    "too few": (lambda **columns: [1.0, 1.0], f"returned 2 values, {WANTED}"),
    "too many": (lambda **columns: [1.0] * 4, f"returned 4 values, {WANTED}"),
    "none": (lambda **columns: [], f"returned 0 values, {WANTED}"),
    "nothing": (lambda **columns: None, f"returned a NoneType, {WANTED}"),
    "one number": (lambda **columns: 1.0, f"returned a float, {WANTED}"),
    "one number of numpy's": (lambda **columns: np.array(1.0), f"returned a ndarray of shape (), {WANTED}"),
    "a text as long": (lambda **columns: "123", f"returned a str, {WANTED}"),
    "bytes as long": (lambda **columns: b"123", f"returned a bytes, {WANTED}"),
    "a generator": (lambda **columns: (1.0 for _ in range(3)), f"returned a generator, {WANTED}"),
    "a mapping": (lambda **columns: {0: 1.0, 1: 1.0, 2: 1.0}, f"returned a dict, {WANTED}"),
    "two numbers a completion": (lambda **columns: [[1.0, 0.0]] * 3, f"returned 3 sequences, {WANTED}"),
    "shape (3, 2)": (lambda **columns: np.zeros((3, 2)), f"returned a ndarray of shape (3, 2), {WANTED}"),
    "shape (1, 3)": (lambda **columns: np.zeros((1, 3)), f"returned a ndarray of shape (1, 3), {WANTED}"),
    "a set": (lambda **columns: {0.0, 1.0, 2.0}, f"returned a set, {WANTED}"),
    "an exception": (lambda **columns: raises(KeyError("right")), "raised KeyError: 'right' ("),
    "an exception of many lines": (lambda **columns: raises(ValueError("a\n b")), "raised ValueError: a b ("),
    "an exception of one long line": (
        lambda **columns: raises(ValueError("x" * 10**6)),
        f"raised ValueError: {'x' * 300} (",
    ),
    "an exception with control characters": (
        lambda **columns: raises(ValueError("a\x1b[2J\0")),
        "raised ValueError: a\\x1b[2J\\x00 (",
    ),
    "an exception without words": (
        lambda **columns: raises(Wordless()),
        "raised Wordless: (its words cannot be made: RuntimeError) (",
    ),
    "an exit": (lambda **columns: sys.exit(3), "raised SystemExit: 3 ("),
    "an interrupt": (lambda **columns: raises(KeyboardInterrupt()), "raised KeyboardInterrupt ("),
    "a missing keyword": (lambda completions: [1.0] * 3, "raised TypeError: "),
}


@pytest.mark.parametrize(("function", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_function_is_told_in_one_line(function: Any, words: str) -> None:
    checked = checked_call(function, "score", ["a", "b", "c"], {"correct_index": [0, 0, 0]})
    assert checked.problem is not None and "\n" not in checked.problem
    assert checked.problem.startswith(f"reward function score {words}")
    assert [math.isnan(value) for value in checked.values] == [True] * 3


def test_the_place_of_an_exception_is_told() -> None:
    problem = checked_call(lambda **columns: [1 / 0], "score", ["a"], {}).problem
    assert problem is not None and re.search(r"ZeroDivisionError: division by zero \(\S+\.py, line \d+\)", problem)


REWARD_FILE = """
import math

def score(completions, correct_index, **columns):
    return [float(len(text)) for text in completions]

async def later(completions, **columns):
    return [0.0]

def wants_more(completions, solution, **columns):
    return [0.0]

def takes_few(completions, correct_index):
    return [0.0]

class Scorer:
    def __call__(self, completions, **columns):
        return [2.0 for _ in completions]

scorer = Scorer()
number = 3
"""


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    path = tmp_path / "my reward.py"
    path.write_text(REWARD_FILE, encoding="utf-8")
    return path


def test_a_function_is_loaded_from_its_file_which_runs_once(reward_file: Path) -> None:
    options = parse_options(["--reward", f"{reward_file}:score"])
    reward = own_reward(options)
    assert reward is not None
    with contextlib.closing(reward):
        assert reward(["a", "abc"], correct_index=[0, 0]).values == [1.0, 3.0]
        reward_file.write_text("1 / 0")
        assert own_reward(options) is reward


def test_an_object_that_can_be_called_is_a_function(reward_file: Path) -> None:
    function = load_reward_function(f"{reward_file}:scorer")
    assert name_of(function) == "Scorer"
    assert checked_call(function, "Scorer", ["a", "b"], {}).values == [2.0, 2.0]


def test_without_the_flag_there_is_none() -> None:
    assert own_reward(parse_options([])) is None


UNUSABLE = {
    "my reward.py:missing": r"has no function missing; it has \['later', 'score', 'takes_few', 'wants_more'\]",
    "my reward.py:number": "has no function number",
    "my reward.py:math": "has no function math",
    "my reward.py:later": "is async, but wanted a plain function; call asyncio.run in it",
    "my reward.py:wants_more": r"cannot be called with the keywords prompts, completions, .* \(missing a required",
    "my reward.py:takes_few": r"cannot be called with .* take completions by name, and \*\*columns",
    "my reward.py": "wanted path/to/file.py:function",
    "my reward.py:": "wanted path/to/file.py:function",
    ":score": "wanted path/to/file.py:function",
    "score": "wanted path/to/file.py:function",
    "my reward.txt:score": "wanted path/to/file.py:function",
    "other.py:score": "other.py is not a file; correct the path",
    "broken.py:score": "reward=broken.py:score failed with ZeroDivisionError: division by zero; correct it",
    "leaves.py:score": "reward=leaves.py:score failed with SystemExit: 4; correct it",
    "no python.py:score": "reward=no python.py:score failed with SyntaxError",
}


@pytest.mark.parametrize(("spec", "words"), UNUSABLE.items(), ids=UNUSABLE.keys())
def test_what_is_no_reward_function_is_refused_before_a_weight_loads(
    spec: str, words: str, reward_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reward_file.parent)
    for name, text in (("broken.py", "1 / 0"), ("leaves.py", "import sys; sys.exit(4)"), ("no python.py", "score =")):
        Path(name).write_text(text)
    with pytest.raises(UsageError, match=words):
        own_reward(parse_options(["--reward", spec]))


def test_the_file_survives_an_overwrite(reward_file: Path) -> None:
    code = own_code(parse_options(["--reward", f"{reward_file}:score"]))
    assert paths_read("toy", "data", code)["reward"] == str(reward_file)


def test_the_documented_reward_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "your_own_task.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_reward.py").write_text(example)
    function = load_reward_function(f"{tmp_path}/my_reward.py:score")
    columns = dict.fromkeys(KEYWORDS) | {"verdict": [Verdict("inside", True), Verdict("background", False)]}
    assert function(**(columns | {"completions": ["a", "b"]})) == [1.0, -0.1]


@pytest.mark.parametrize(("error", "code"), [(UsageError("why"), 2), (RunStopped("why"), 1)])
def test_a_run_that_stops_says_why_in_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.run(lambda: raises(error)) == code
    assert capsys.readouterr().err.lstrip("\n") == "error: why\n"
