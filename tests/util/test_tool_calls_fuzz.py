"""The parser under fuzzing: nothing raises, a second recogniser agrees on every string, and none takes long.

20,000 strings every day, as many as FLEET_FUZZ_EXAMPLES says at night. Times are of the processor and counted in plain
passes, loops of Python over as long a call as is read, so that they hold on a busy and on a slow machine.
"""

import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import FUZZ_SEED, NUM_FUZZED_STRINGS, call_text
from tests.fuzzed_calls import FRAGMENTS, fuzzed_text, index_by_grammar, status_by_counting
from utils.tool_calls import ParsedToolCall, ParseStatus, make_tool_call_str, parse_tool_call_str

CALL = call_text(2)


def disagreement(parsed: ParsedToolCall, text: str, allow_reasoning: bool) -> str | None:
    """How a result differs from what the grammar and the counts say; None if it does not."""
    index = index_by_grammar(text, allow_reasoning=allow_reasoning)
    if (parsed.status is ParseStatus.OK) != (index is not None) or parsed.index != index:
        return f"{parsed}, but the grammar says {index}: {text!r}"
    if parsed.index is not None and type(parsed.index) is not int:
        return f"{parsed}, whose index is no int: {text!r}"
    status = status_by_counting(text, allow_reasoning=allow_reasoning)
    return None if status in (None, parsed.status) else f"{parsed}, but the counts say {status}: {text!r}"


def nanoseconds(work: Callable[[], object]) -> int:
    """The processor time that one call takes."""
    start = time.thread_time_ns()
    work()
    return time.thread_time_ns() - start


@pytest.fixture(scope="module")
def plain_pass_ns() -> int:
    """The least processor time of a pass over 4,096 characters: about 150,000 ns."""
    text = "x" * 4096
    return min(nanoseconds(lambda: sum(char in "{[" for char in text)) for _ in range(200))


@dataclass
class Survey:
    """What the parser made of the whole corpus, each string without and with leave to reason."""

    statuses: Counter[ParseStatus] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    nanoseconds: "array[int]" = field(default_factory=lambda: array("q"))
    slowest: str = ""


@pytest.fixture(scope="module")
def survey() -> Survey:
    found, worst = Survey(), 0
    for number in range(NUM_FUZZED_STRINGS):
        text = fuzzed_text(FUZZ_SEED, number)
        for allow_reasoning in (False, True):
            start = time.thread_time_ns()
            try:
                parsed = parse_tool_call_str(text, allow_reasoning=allow_reasoning)
            except Exception as error:
                found.failures.append(f"raised {error!r}: {text!r}")
                continue
            taken = time.thread_time_ns() - start
            found.nanoseconds.append(taken)
            if taken > worst:
                worst, found.slowest = taken, text
            found.statuses[parsed.status] += 1
            wrong = disagreement(parsed, text, allow_reasoning)
            found.failures += [] if wrong is None else [wrong]
    return found


def test_no_string_raises_and_the_grammar_accepts_the_same(survey):
    assert survey.failures[:5] == [], f"{len(survey.failures)} of seed {FUZZ_SEED}"
    assert survey.statuses.total() == 2 * NUM_FUZZED_STRINGS


def test_the_strings_reach_every_status_and_are_often_accepted(survey):
    assert min(survey.statuses[status] for status in ParseStatus) > NUM_FUZZED_STRINGS / 200
    assert 0.1 < survey.statuses[ParseStatus.OK] / survey.statuses.total() < 0.6


def test_99_of_100_strings_take_less_than_ten_plain_passes(survey, plain_pass_ns):
    ordered = sorted(survey.nanoseconds)
    p99_ms, worst_ms = ordered[len(ordered) * 99 // 100] / 1e6, ordered[-1] / 1e6
    print(f"{NUM_FUZZED_STRINGS:,} strings of seed {FUZZ_SEED}, each parsed twice: p99 {p99_ms:.3f} ms, ", end="")
    print(f"worst {worst_ms:.3f} ms ({len(survey.slowest):,} characters)")
    assert p99_ms < 10 * plain_pass_ns / 1e6


ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates included
PIECES = st.sampled_from([CALL, *FRAGMENTS]) | st.text(ANY_CHARACTER, max_size=5)
# half of the splices are where a call can bear one: before the JSON, at the index, after the JSON, at either end
BEARABLE = st.sampled_from([0, len("<tool_call>"), CALL.index("2"), CALL.index("2") + 1, CALL.index("</"), len(CALL)])
SPLICES = st.lists(
    st.tuples(
        st.integers(0, len(CALL)) | BEARABLE,  # where
        st.integers(0, 2),  # characters deleted there
        st.sampled_from([*"0123456789-+.eE_\"'{}[]:, \n\t`<>/\\", "true", "17", "-3", ""])
        | st.text(ANY_CHARACTER, max_size=1),
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def spliced_calls(draw):
    text = CALL
    for start, num_deleted, inserted in draw(SPLICES):
        text = text[:start] + inserted + text[start + num_deleted :]
    return text


# hypothesis takes a hundred times as long a string, and shrinks what it finds
@settings(max_examples=max(NUM_FUZZED_STRINGS // 20, 1))
@given(st.text(ANY_CHARACTER) | st.lists(PIECES).map("".join) | spliced_calls(), st.booleans())
def test_hypothesis_finds_no_string_that_raises_or_is_judged_otherwise(text, allow_reasoning):
    parsed = parse_tool_call_str(text, allow_reasoning=allow_reasoning)
    assert disagreement(parsed, text, allow_reasoning) is None


@given(st.integers())
def test_what_is_made_parses_back(index):
    assert parse_tool_call_str(make_tool_call_str(index)) == ParsedToolCall(ParseStatus.OK, index)


# each is repeated up to the length asked for
UNITS = ["<", "<tool_call", "<tool_call>", "</tool_call>", '"', "\\", '\\"', "{", "[]", '{"a":', "9", "```json", "```",
         "```json \n", " ", "\n", "é", "\U0001f600", "\ud800", "<|im_end|>"]  # fmt: skip


def repeated(unit: str, length: int) -> str:
    return (unit * (length // len(unit) + 1))[:length]


def takes_less_than(limit_ns: float, text: str, *, allow_reasoning: bool) -> bool:
    """True if the quickest of ten parses takes less; one alone may wait for memory."""
    times = (nanoseconds(lambda: parse_tool_call_str(text, allow_reasoning=allow_reasoning)) for _ in range(10))
    return any(taken < limit_ns for taken in times)


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_time_stays_under_a_line_over_four_decades_of_length(unit, plain_pass_ns):
    # not a ratio of times: a copy that leaves the processor's cache is 60 times slower for 10 times the length
    for length in (1_000, 10_000, 100_000, 1_000_000, 10_000_000):
        limit_ns = (10 + 20 * length / 4096) * plain_pass_ns
        for before, after in (("", ""), ("", CALL), ("", f"x{CALL}"), (CALL, ""), ("```json", f"{CALL}```")):
            text = before + repeated(unit, length) + after
            for allow_reasoning in (False, True):
                assert takes_less_than(limit_ns, text, allow_reasoning=allow_reasoning), f"{length:,} characters"


@pytest.mark.parametrize("unit", [*UNITS, '{"a":1,', '"a":', "[0,", "-", "0.", "\\u0069"], ids=ascii)
def test_the_longest_text_that_json_sees_takes_fifty_plain_passes_at_most(unit, plain_pass_ns):
    # the slowest take 6, and 700 where an unterminated string is scanned again from each of its quotes
    limit_ns = 50 * plain_pass_ns
    room = 4096 - len("<tool_call></tool_call>")
    for inside in (repeated(unit, room), f'"{repeated(unit, room - 2)}"', f"{{{repeated(unit, room - 1)}"):
        assert takes_less_than(limit_ns, f"<tool_call>{inside}</tool_call>", allow_reasoning=True)
    for literal in ("9" * 3900, "1" * 3800 + ".5", "1e" + "9" * 3800):
        assert takes_less_than(limit_ns, CALL.replace("2", literal), allow_reasoning=False)
