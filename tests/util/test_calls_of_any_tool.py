"""Calls of tools of one's own: their text, what is read of it, and the prompt that asks for one.

test_tool_calls.py has the policy of the text around a call, on the tool that picks an image.
"""

import json
import random
from typing import Any

import pytest

from tests.conftest import FUZZ_SEED
from utils.tool_calls import ParsedCall, ParseStatus, ToolCall, make_call_str, parse_call_str, system_text
from utils.tool_schemas import checked_tools

pytestmark = pytest.mark.fast

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
CLICK = {
    "name": "click",
    "description": "Click a point.",
    "parameters": {"type": "object", "properties": {"x": INTEGER, "y": INTEGER}, "required": ["x", "y"]},
}
WRITE = {
    "name": "write",
    "description": "Écrit.",
    "parameters": {
        "type": "object",
        "properties": {
            "text": TEXT, "size": {"type": "number"}, "bold": {"type": "boolean"},
            "tags": {"type": "array", "items": TEXT}, "align": {"enum": ["left", "right"]},
        },
        "required": ["text"],
    },
}  # fmt: skip
BOTH = checked_tools([CLICK, WRITE])


def said(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'


def written(text: str) -> ToolCall:
    return ToolCall("write", {"text": text})


GOOD_CLICK = said('"click"', '{"x": 3, "y": 4}')
ACCEPTED: dict[str, tuple[str, ToolCall]] = {
    "two numbers": (said('"click"', '{"x": 3, "y": -4}'), ToolCall("click", {"x": 3, "y": -4})),
    "in the other order": (said('"click"', '{"y": -4, "x": 3}'), ToolCall("click", {"x": 3, "y": -4})),
    "the other tool": (said('"write"', '{"text": "a"}'), ToolCall("write", {"text": "a"})),
    "optional arguments": (
        said('"write"', '{"text": "", "size": 1e2, "bold": true, "tags": ["a", ""], "align": "left"}'),
        ToolCall("write", {"text": "", "size": 100.0, "bold": True, "tags": ["a", ""], "align": "left"}),
    ),
    "letters of other scripts": (said('"write"', '{"text": "héllo 猫 🔴 שלום"}'), written("héllo 猫 🔴 שלום")),
    "escaped letters": (said('"write"', r'{"text": "\u732b \ud83d\udd34 \n\""}'), written('猫 🔴 \n"')),
    "an escaped wrapper": (said('"write"', r'{"text": "\u003ctool_call>"}'), written("<tool_call>")),
    "brackets in a text": (said('"write"', '{"text": "' + "[{" * 20 + '"}'), written("[{" * 20)),
    "a fence": (f"```json\n{GOOD_CLICK}\n```", ToolCall("click", {"x": 3, "y": 4})),
}  # fmt: skip


@pytest.mark.parametrize(("text", "call"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(text: str, call: ToolCall) -> None:
    parsed = parse_call_str(text, BOTH)
    assert parsed == ParsedCall(ParseStatus.OK, call)
    assert parsed.call is not None and json.dumps(parsed.call.arguments, sort_keys=True) == json.dumps(
        call.arguments, sort_keys=True
    ), "equal in type too"


# the status for click alone, and for the two tools
REFUSED: dict[str, tuple[str, str, str]] = {
    "nothing": ("", "no_call", "no_call"),
    "prose": ("I click at 3, 4.", "no_call", "no_call"),
    "two calls": (GOOD_CLICK * 2, "multiple_calls", "multiple_calls"),
    "a call of each tool": (GOOD_CLICK + said('"write"', '{"text": "a"}'), "multiple_calls", "multiple_calls"),
    "a wrapper in a text": (said('"write"', '{"text": "<tool_call>"}'), "multiple_calls", "multiple_calls"),
    "text before": (f"Here: {GOOD_CLICK}", "extra_text", "extra_text"),
    "text after": (f"{GOOD_CLICK}!", "extra_text", "extra_text"),
    "a closing wrapper in a text": (said('"write"', '{"text": "</tool_call>"}'), "extra_text", "extra_text"),
    "not closed": (GOOD_CLICK.removesuffix("</tool_call>"), "malformed_json", "malformed_json"),
    "a list": ("<tool_call>[]</tool_call>", "malformed_json", "malformed_json"),
    "x twice": (said('"click"', '{"x": 3, "x": 3, "y": 4}'), "malformed_json", "malformed_json"),
    "not a number": (said('"click"', '{"x": NaN, "y": 4}'), "malformed_json", "malformed_json"),
    "a line break in a text": (said('"write"', '{"text": "a\nb"}'), "malformed_json", "malformed_json"),
    "a tool that is none": (said('"press"', '{"x": 3, "y": 4}'), "wrong_name", "wrong_name"),
    "in other letters": (said('"Click"', '{"x": 3, "y": 4}'), "wrong_name", "wrong_name"),
    "no name": ('<tool_call>{"arguments": {"x": 3, "y": 4}}</tool_call>', "wrong_name", "wrong_name"),
    "a list of names": (said('["click"]', '{"x": 3, "y": 4}'), "wrong_name", "wrong_name"),
    "the other tool": (said('"write"', '{"text": "a"}'), "wrong_name", "ok"),
    "the other tool's arguments": (said('"click"', '{"text": "a"}'), "bad_arguments", "bad_arguments"),
    "a number as text": (said('"click"', '{"x": "3", "y": 4}'), "bad_arguments", "bad_arguments"),
    "no whole number": (said('"click"', '{"x": 3.0, "y": 4}'), "bad_arguments", "bad_arguments"),
    "true": (said('"click"', '{"x": true, "y": 4}'), "bad_arguments", "bad_arguments"),
    "a huge number": (said('"click"', '{"x": 1e999, "y": 4}'), "bad_arguments", "bad_arguments"),
    "one too few": (said('"click"', '{"x": 3}'), "bad_arguments", "bad_arguments"),
    "one too many": (said('"click"', '{"x": 3, "y": 4, "z": 5}'), "bad_arguments", "bad_arguments"),
    "no arguments": ('<tool_call>{"name": "click"}</tool_call>', "bad_arguments", "bad_arguments"),
    "a list of arguments": (said('"click"', "[3, 4]"), "bad_arguments", "bad_arguments"),
    "a third key": (
        '<tool_call>{"name": "click", "arguments": {"x": 3, "y": 4}, "id": 1}</tool_call>',
        "bad_arguments", "bad_arguments",
    ),
    "an infinite size": (said('"write"', '{"text": "a", "size": 1e999}'), "wrong_name", "bad_arguments"),
    "a choice that is none": (said('"write"', '{"text": "a", "align": "up"}'), "wrong_name", "bad_arguments"),
    "an entry of another type": (said('"write"', '{"text": "a", "tags": ["a", 1]}'), "wrong_name", "bad_arguments"),
    "half a surrogate pair": (said('"write"', r'{"text": "\ud800"}'), "wrong_name", "bad_arguments"),
    "too long": (said('"write"', '{"text": "' + "a" * 4096 + '"}'), "too_long", "too_long"),
    "nested 9 deep": (said('"write"', '{"text": ' + "[" * 7 + "]" * 7 + "}"), "too_long", "too_long"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "of_one", "of_two"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_for_its_own_reason(text: str, of_one: str, of_two: str) -> None:
    for tools, status in ((BOTH[:1], of_one), (BOTH, of_two)):
        parsed = parse_call_str(text, tools)
        assert parsed.status == status and (parsed.call is None) is (status != "ok")


def test_the_table_shows_every_status() -> None:
    assert {row[2] for row in REFUSED.values()} | {"ok"} == {status.value for status in ParseStatus}


def random_text(rng: random.Random) -> str:
    letters = 'ab \t\n"\\/{}[]:,éñ猫🔴\u200d\u0000\x7f\u2028<>|'
    return "".join(rng.choice(letters) for _ in range(rng.randrange(12)))


def random_call(rng: random.Random) -> ToolCall:
    if rng.random() < 0.3:
        return ToolCall("click", {"x": rng.randrange(-(10**12), 10**12), "y": rng.randrange(-5, 5)})
    drawn: dict[str, Any] = {
        "text": random_text(rng),
        "size": rng.choice([0, -3, 0.1, -1e-30, 1e300, 2**70, rng.random()]),
        "bold": rng.random() < 0.5,
        "tags": [random_text(rng) for _ in range(rng.randrange(4))],
        "align": rng.choice(["left", "right"]),
    }
    kept = [name for name in drawn if name == "text" or rng.random() < 0.5]
    rng.shuffle(kept)
    return ToolCall("write", {name: drawn[name] for name in kept})


def test_what_is_written_is_read_back_the_same() -> None:
    rng = random.Random(FUZZ_SEED)
    for _ in range(3000):
        call = random_call(rng)
        parsed = parse_call_str(make_call_str(call), BOTH)
        assert parsed == ParsedCall(ParseStatus.OK, call), call
        assert parsed.call is not None and repr(parsed.call) == repr(call), "equal in type and order too"


def test_anything_else_is_refused_and_nothing_raises() -> None:
    """Calls with a few characters changed: what is still read fits the schema by a check that is written out here."""
    rng, num_read = random.Random(FUZZ_SEED), 0
    pieces = [*'{}[]":,\\ \n0-9e.', "true", "null", "1e999", "\ud800", r"\ud800", "<tool_call>", "</tool_call>", "NaN"]
    for _ in range(6000):
        text = make_call_str(random_call(rng))
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(pieces) + text[place + rng.randrange(3) :]
        parsed = parse_call_str(text, BOTH, allow_reasoning=rng.random() < 0.5)
        assert (parsed.call is None) is (parsed.status is not ParseStatus.OK)
        if parsed.call is not None:
            num_read += 1
            assert fits(parsed.call), text
    assert num_read > 100, "some changes are within a text"


def fits(call: ToolCall) -> bool:
    given = dict(call.arguments)
    if call.name == "click":
        return given.keys() == {"x", "y"} and {type(value) for value in given.values()} == {int}
    is_bounded = abs(given.get("size", 0)) < float("inf") and type(given.get("size", 0)) in (int, float)
    tags = given.get("tags", [])
    texts = [given["text"], given.get("align", "left"), *tags]
    "".join(texts).encode()
    return (
        call.name == "write"
        and given.keys() <= {"text", "size", "bold", "tags", "align"}
        and is_bounded
        and type(given.get("bold", True)) is bool
        and given.get("align", "left") in ("left", "right")
        and {type(text) for text in texts} == {str}
    )


@pytest.mark.parametrize("arguments", [{"x": float("nan")}, {"x": float("inf")}, {"x": {1, 2}}, {"x": b"a"}, None])
def test_a_call_is_made_of_plain_json_only(arguments: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        make_call_str(ToolCall("click", arguments))


WORDS = [
    (ToolCall("count", {"n": 3}), "3"),
    (ToolCall("say", {"text": "é 3"}), "é 3"),
    (ToolCall("look"), "look"),
    (ToolCall("mark", {"is_red": True}), "true"),
    (ToolCall("click", {"x": 3, "y": 4}), '{"x": 3, "y": 4}'),
    (ToolCall("write", {"text": "猫", "size": 0.5}), '{"text": "猫", "size": 0.5}'),
]


@pytest.mark.parametrize(("call", "words"), WORDS)
def test_a_call_in_words(call: ToolCall, words: str) -> None:
    assert str(call) == words


def test_the_text_of_a_call() -> None:
    assert make_call_str(ToolCall("write", {"text": 'a "猫"\n', "size": 0.5})) == (
        '<tool_call>\n{"name": "write", "arguments": {"text": "a \\"猫\\"\\n", "size": 0.5}}\n</tool_call>'
    )


# --- the prompt -------------------------------------------------------------------------------------------------------

CLICK_SCHEMA = (
    '{"name": "click", "description": "Click a point.", "parameters": {"type": "object", "properties": '
    '{"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]}}'
)
WRITE_SCHEMA = (
    '{"name": "write", "description": "Écrit.", "parameters": {"type": "object", "properties": {"text": {"type": '
    '"string"}, "size": {"type": "number"}, "bold": {"type": "boolean"}, "tags": {"type": "array", "items": {"type": '
    '"string"}}, "align": {"enum": ["left", "right"]}}, "required": ["text"]}}'
)
CLICK_FORM = """<tool_call>
{"name": "click", "arguments": {"x": NUMBER, "y": NUMBER}}
</tool_call>"""
WRITE_FORM = """<tool_call>
{"name": "write", "arguments": {"text": "TEXT", "size": NUMBER, "bold": TRUE OR FALSE, "tags": [...], "align": VALUE}}
</tool_call>"""


def test_the_prompt_of_one_tool() -> None:
    assert system_text([CLICK]) == (
        f"You have one tool:\n{CLICK_SCHEMA}\nReply with exactly one call and nothing else, in this form:\n{CLICK_FORM}"
    )


def test_the_prompt_of_two_tools_that_asks_to_think() -> None:
    assert system_text(BOTH, allow_reasoning=True) == (
        f"You have 2 tools, of which you call one:\n{CLICK_SCHEMA}\n{WRITE_SCHEMA}\n"
        "Think first if it helps, then end your reply with exactly one call, in this form:\n"
        f"{CLICK_FORM}\nor\n{WRITE_FORM}"
    )


def test_the_form_that_is_shown_is_no_call_itself() -> None:
    for form in (CLICK_FORM, WRITE_FORM):
        assert parse_call_str(form, BOTH).status is ParseStatus.MALFORMED_JSON
