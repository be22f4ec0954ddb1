"""What counts as a tool call: each table is one clause of the parsing policy; fuzzing has a file of its own."""

import pytest

from tests.conftest import call_text
from utils.tool_calls import ParsedToolCall, ParseStatus, make_tool_call_str, parse_tool_call_str

pytestmark = pytest.mark.fast

CALL = '<tool_call>\n{"name": "pick_image", "arguments": {"index": 2}}\n</tool_call>'


def wrapped(inside: str) -> str:
    return f"<tool_call>{inside}</tool_call>"


def with_index(literal: str) -> str:
    return wrapped('{"name": "pick_image", "arguments": {"index": ' + literal + "}}")


def with_arguments(literal: str) -> str:
    return wrapped('{"name": "pick_image", "arguments": ' + literal + "}")


def with_name(literal: str) -> str:
    return wrapped('{"name": ' + literal + ', "arguments": {"index": 2}}')


def nested(depth: int) -> str:
    """A call whose JSON is nested `depth` deep, the call's own braces included."""
    return with_arguments("[" * (depth - 1) + "]" * (depth - 1))


ACCEPTED = {
    "canonical": (CALL, 2),
    "index 0": (with_index("0"), 0),
    "two digits": (with_index("17"), 17),
    "negative: its range is the environment's affair": (with_index("-1"), -1),
    "minus zero is zero": (with_index("-0"), 0),
    "4,000 digits": (with_index("9" * 4000), 10**4000 - 1),
    "no blanks": ('<tool_call>{"name":"pick_image","arguments":{"index":2}}</tool_call>', 2),
    "keys in the other order": (wrapped('{"arguments": {"index": 2}, "name": "pick_image"}'), 2),
    "JSON over several lines": (wrapped('\r\n{\n\t"name": "pick_image",\n\t"arguments": {\n"index": 2\n}\n}\n'), 2),
    "JSON escape in the name": (with_name(r'"pick\u005fimage"'), 2),
    "JSON escape in a key": (with_arguments(r'{"\u0069ndex": 2}'), 2),
    "blanks around": (f" \t\r\n{CALL}\n\n\t ", 2),
    "fence around": (f"```json\n{CALL}\n```", 2),
    "fence on the same line": (f"```json{CALL}```", 2),
    "blanks around a fence": (f"\n\n```json\n\n{CALL}\n\n```\n", 2),
    "4,096 characters": (CALL.ljust(4096), 2),
}

REFUSED_WRAPPER = {
    "nothing": ("", "no_call"),
    "blanks only": (" \n\t", "no_call"),
    "prose": ("I pick image 2.", "no_call"),
    "bare number": ("2", "no_call"),
    "JSON without wrapper": ('{"name": "pick_image", "arguments": {"index": 2}}', "no_call"),
    "fenced JSON without wrapper": ('```json\n{"name": "pick_image", "arguments": {"index": 2}}\n```', "no_call"),
    "closing wrapper only": (CALL.removeprefix("<tool_call>"), "no_call"),
    "upper-case wrapper": (CALL.replace("tool_call", "TOOL_CALL"), "no_call"),
    "blank in the wrapper": (CALL.replace("<tool_call>", "<tool_call >"), "no_call"),
    "escaped wrapper": (CALL.replace("<", "&lt;").replace(">", "&gt;"), "no_call"),
    "wrapper of another model": (CALL.replace("tool_call", "function_call"), "no_call"),
    "lone surrogate alone": ("\ud800", "no_call"),
    "opening wrapper only": ("<tool_call>", "malformed_json"),
    "never closed": (CALL.removesuffix("</tool_call>"), "malformed_json"),
    "last character cut off": (CALL[:-1], "malformed_json"),
    "closed by junk": (CALL.replace("</tool_call>", "<|im_end|>"), "malformed_json"),
    "closed by an opening wrapper": (CALL.replace("</tool_call>", "<tool_call>"), "multiple_calls"),
    "empty wrapper": (wrapped(""), "malformed_json"),
}

REFUSED_SECOND_CALL = {
    "the same twice": (CALL + CALL, "multiple_calls"),
    "another index on the next line": (f"{CALL}\n{call_text(3)}", "multiple_calls"),
    "all four": ("\n".join(call_text(index) for index in range(4)), "multiple_calls"),
    "two in one fence": (f"```json\n{CALL}\n{CALL}\n```", "multiple_calls"),
    "a second one cut off": (f"{CALL}\n<tool_call>", "multiple_calls"),
    "one within another": (wrapped(CALL), "multiple_calls"),
    "wrapper within a string": (with_index('"<tool_call>"'), "multiple_calls"),
    "two objects in one wrapper": (wrapped('{"name": "pick_image", "arguments": {"index": 2}}' * 2), "malformed_json"),
    "list of calls": (wrapped('[{"name": "pick_image", "arguments": {"index": 2}}]'), "malformed_json"),
}

REFUSED_TEXT_AROUND = {
    "word before": (f"Sure! {CALL}", "extra_text"),
    "word after": (f"{CALL} Done.", "extra_text"),
    "full stop after": (f"{CALL}.", "extra_text"),
    "second closing wrapper": (f"{CALL}</tool_call>", "extra_text"),
    "closing wrapper before": (f"</tool_call>{CALL}", "extra_text"),
    "closing wrapper within a string": (with_index('"</tool_call>"'), "extra_text"),
    "end-of-turn token after": (f"{CALL}<|im_end|>", "extra_text"),
    "end-of-text token after": (f"{CALL}<|endoftext|>", "extra_text"),
    "start of another turn after": (f"{CALL}<|im_start|>assistant", "extra_text"),
    "image token before": (f"<|image_pad|>{CALL}", "extra_text"),
    "byte order mark before": (f"\ufeff{CALL}", "extra_text"),
    "no-break space before": (f"\u00a0{CALL}", "extra_text"),
    "zero-width space after": (f"{CALL}\u200b", "extra_text"),
    "form feed after": (f"{CALL}\f", "extra_text"),
    "NUL after": (f"{CALL}\0", "extra_text"),
    "lone surrogate after": (f"{CALL}\udfff", "extra_text"),
    "fence of no language": (f"```\n{CALL}\n```", "extra_text"),
    "fence of another language": (f"```xml\n{CALL}\n```", "extra_text"),
    "fence in upper case": (f"```JSON\n{CALL}\n```", "extra_text"),
    "fence of tildes": (f"~~~json\n{CALL}\n~~~", "extra_text"),
    "fence of four backticks": (f"````json\n{CALL}\n````", "extra_text"),
    "fence never closed": (f"```json\n{CALL}", "extra_text"),
    "fence never opened": (f"{CALL}\n```", "extra_text"),
    "fence around a fence": (f"```json\n```json\n{CALL}\n```\n```", "extra_text"),
    "word within the fence": (f"```json\nSure: {CALL}\n```", "extra_text"),
    "word after the fence": (f"```json\n{CALL}\n``` Done.", "extra_text"),
    "fence within the wrapper": (
        '<tool_call>```json\n{"name": "pick_image", "arguments": {"index": 2}}\n```</tool_call>',
        "malformed_json",
    ),
}

REFUSED_JSON = {
    "truncated before the last brace": (wrapped('{"name": "pick_image", "arguments": {"index": 2}'), "malformed_json"),
    "truncated within a string": (wrapped('{"name": "pick_im'), "malformed_json"),
    "one brace too many": (wrapped('{"name": "pick_image", "arguments": {"index": 2}}}'), "malformed_json"),
    "trailing comma": (wrapped('{"name": "pick_image", "arguments": {"index": 2},}'), "malformed_json"),
    "trailing comma in the arguments": (with_arguments('{"index": 2,}'), "malformed_json"),
    "single quotes": (wrapped("{'name': 'pick_image', 'arguments': {'index': 2}}"), "malformed_json"),
    "curly quotes": (wrapped("{“name”: “pick_image”, “arguments”: {“index”: 2}}"), "malformed_json"),
    "keys without quotes": (wrapped('{name: "pick_image", arguments: {index: 2}}'), "malformed_json"),
    "comment": (with_index("2 /* surely */"), "malformed_json"),
    "function call": (wrapped("pick_image(2)"), "malformed_json"),
    "string": (wrapped('"pick_image"'), "malformed_json"),
    "number": (wrapped("2"), "malformed_json"),
    "null": (wrapped("null"), "malformed_json"),
    "byte order mark": (wrapped('\ufeff{"name": "pick_image", "arguments": {"index": 2}}'), "malformed_json"),
    "no-break space": (with_index("\u00a02"), "malformed_json"),
    "line break within a string": (with_name('"pick_image\n"'), "malformed_json"),
    "special token": (with_index("2<|im_end|>"), "malformed_json"),
    "image token": (wrapped('<|image_pad|>{"name": "pick_image", "arguments": {"index": 2}}'), "malformed_json"),
    "lone surrogate": (with_index("\ud800"), "malformed_json"),
    "name twice": (
        wrapped('{"name": "pick_image", "name": "pick_image", "arguments": {"index": 2}}'),
        "malformed_json",
    ),
    "arguments twice": (
        wrapped('{"name": "pick_image", "arguments": {"index": 1}, "arguments": {"index": 2}}'),
        "malformed_json",
    ),
    "index twice": (with_arguments('{"index": 1, "index": 2}'), "malformed_json"),
    "index twice, once escaped": (with_arguments(r'{"index": 1, "\u0069ndex": 2}'), "malformed_json"),
    "a key twice deeper down": (with_index('{"a": 1, "a": 1}'), "malformed_json"),
}

REFUSED_NUMBER = {
    "NaN": (with_index("NaN"), "malformed_json"),
    "Infinity": (with_index("Infinity"), "malformed_json"),
    "-Infinity": (with_index("-Infinity"), "malformed_json"),
    "1e400": (with_index("1e400"), "bad_arguments"),
    "2e0": (with_index("2e0"), "bad_arguments"),
    "2.0": (with_index("2.0"), "bad_arguments"),
    "2.": (with_index("2."), "malformed_json"),
    "02": (with_index("02"), "malformed_json"),
    "+2": (with_index("+2"), "malformed_json"),
    "1_0": (with_index("1_0"), "malformed_json"),
    "0x2": (with_index("0x2"), "malformed_json"),
    "1+1": (with_index("1+1"), "malformed_json"),
    "full-width digit": (with_index("２"), "malformed_json"),
    "Arabic-Indic digit": (with_index("٢"), "malformed_json"),
    "superscript digit": (with_index("²"), "malformed_json"),
    "no value": (with_index(""), "malformed_json"),
    "true": (with_index("true"), "bad_arguments"),
    "false": (with_index("false"), "bad_arguments"),
    "True, as Python writes it": (with_index("True"), "malformed_json"),
    "null": (with_index("null"), "bad_arguments"),
    "string": (with_index('"2"'), "bad_arguments"),
    "list": (with_index("[2]"), "bad_arguments"),
    "list of all": (with_index("[0, 1, 2, 3]"), "bad_arguments"),
    "object": (with_index('{"index": 2}'), "bad_arguments"),
}

REFUSED_KEYS = {
    "another tool": (with_name('"pick_video"'), "wrong_name"),
    "name in another case": (with_name('"Pick_Image"'), "wrong_name"),
    "blank after the name": (with_name('"pick_image "'), "wrong_name"),
    "Cyrillic letter in the name": (with_name('"p\u0456ck_image"'), "wrong_name"),
    "lone surrogate as name": (with_name('"\ud800"'), "wrong_name"),
    "name null": (with_name("null"), "wrong_name"),
    "name in a list": (with_name('["pick_image"]'), "wrong_name"),
    "no name": (wrapped('{"arguments": {"index": 2}}'), "wrong_name"),
    "no key at all": (wrapped("{}"), "wrong_name"),
    "index beside name": (wrapped('{"name": "pick_image", "index": 2}'), "bad_arguments"),
    "no arguments": (wrapped('{"name": "pick_image"}'), "bad_arguments"),
    "arguments empty": (with_arguments("{}"), "bad_arguments"),
    "arguments null": (with_arguments("null"), "bad_arguments"),
    "arguments a number": (with_arguments("2"), "bad_arguments"),
    "arguments a list": (with_arguments('["index"]'), "bad_arguments"),
    "arguments as a string": (with_arguments(r'"{\"index\": 2}"'), "bad_arguments"),
    "arguments by another key": (wrapped('{"name": "pick_image", "parameters": {"index": 2}}'), "bad_arguments"),
    "index by another key": (with_arguments('{"idx": 2}'), "bad_arguments"),
    "index in another case": (with_arguments('{"Index": 2}'), "bad_arguments"),
    "Cyrillic letter in index": (with_arguments('{"\u0456ndex": 2}'), "bad_arguments"),
    "a second argument": (with_arguments('{"index": 2, "reason": "red"}'), "bad_arguments"),
    "a third key": (wrapped('{"name": "pick_image", "arguments": {"index": 2}, "id": 1}'), "bad_arguments"),
}

REFUSED_SIZE = {
    "4,097 characters": (CALL.ljust(4097), "too_long"),
    "4,097 characters without a call": ("x" * 4097, "too_long"),
    "4,097 characters of calls": (CALL * 100, "too_long"),
    "a megabyte": ("<tool_call>" + "[" * 2**20, "too_long"),
    "nested 8 deep": (nested(8), "bad_arguments"),
    "nested 9 deep": (nested(9), "too_long"),
    "nested 1,000 deep": (nested(1000), "too_long"),
    "nested 9 deep by objects": (with_index('{"a":' * 7 + "0" + "}" * 7), "too_long"),
    "1,000 brackets never closed": (wrapped("[" * 1000), "too_long"),
    "brackets within a string do not nest": (with_name('"' + "[" * 9 + '"'), "wrong_name"),
    "brackets after an escaped quote do not nest": (with_name(r'"\"' + "[" * 9 + '"'), "wrong_name"),
    "quote escaped by no backslash": (with_name(r'"\\", "x": ' + "[" * 9 + "]" * 9), "too_long"),
}

REFUSED = {
    f"{clause}: {case}": row
    for clause, table in {
        "wrapper": REFUSED_WRAPPER,
        "second call": REFUSED_SECOND_CALL,
        "text around": REFUSED_TEXT_AROUND,
        "JSON": REFUSED_JSON,
        "number": REFUSED_NUMBER,
        "keys": REFUSED_KEYS,
        "size": REFUSED_SIZE,
    }.items()
    for case, row in table.items()
}

# text, then the status without and with allow_reasoning; every one that is "ok" has index 2
REASONING = {
    "none": (CALL, "ok", "ok"),
    "before": (f"The circle is third.\n{CALL}", "extra_text", "ok"),
    "in think tags": (f"<think>third</think>\n\n{CALL}\n", "extra_text", "ok"),
    "before a fence": (f"The third.\n```json\n{CALL}\n```", "extra_text", "ok"),
    "with a fence of its own": (f'```json\n{{"a": 1}}\n```\n{CALL}', "extra_text", "ok"),
    "with a closing wrapper": (f"</tool_call>{CALL}", "extra_text", "ok"),
    "with JSON of another answer": (f'{{"name": "pick_image", "arguments": {{"index": 1}}}} no: {CALL}',
                                    "extra_text", "ok"),
    "with a lone surrogate": (f"\ud800 {CALL}", "extra_text", "ok"),
    "of 10,000 characters": ("x" * 10_000 + CALL, "too_long", "ok"),
    "then 4,096 characters": ("Third. " + CALL.ljust(4096), "too_long", "ok"),
    "then 4,097 characters": ("Third. " + CALL.ljust(4097), "too_long", "too_long"),
    "after": (f"{CALL}\nbecause it is red", "extra_text", "extra_text"),
    "before and after": (f"Third. {CALL} Done.", "extra_text", "extra_text"),
    "after the fence": (f"Third.\n```json\n{CALL}\n``` Done.", "extra_text", "extra_text"),
    "only": ("I think it is the third.", "no_call", "no_call"),
    "with another call": (f"First {call_text(1)}, no: {CALL}", "multiple_calls", "multiple_calls"),
    "that mentions the wrapper": (f"I end with <tool_call>: {CALL}", "multiple_calls", "multiple_calls"),
    "then a truncated call": (f"Third. {CALL[:-1]}", "extra_text", "malformed_json"),
    "then a nested call": (f"Third. {nested(9)}", "extra_text", "too_long"),
    "then a wrong name": (f"Third. {with_name('null')}", "extra_text", "wrong_name"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "index"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(text, index):
    assert parse_tool_call_str(text) == ParsedToolCall(ParseStatus.OK, index)


@pytest.mark.parametrize(("text", "status"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_for_its_own_reason_and_without_an_index(text, status):
    assert parse_tool_call_str(text) == ParsedToolCall(ParseStatus(status), None)


@pytest.mark.parametrize(("text", "strict", "lenient"), REASONING.values(), ids=REASONING.keys())
def test_reasoning_before_the_call_is_accepted_only_when_allowed(text, strict, lenient):
    assert parse_tool_call_str(text) == ParsedToolCall(ParseStatus(strict), 2 if strict == "ok" else None)
    assert parse_tool_call_str(text, allow_reasoning=True) == ParsedToolCall(
        ParseStatus(lenient), 2 if lenient == "ok" else None
    )


def test_allowing_reasoning_accepts_nothing_else():
    # a case refused for anything but text before the call stays refused
    text_before = {case for case, (text, _) in REFUSED.items() if text.find("<tool_call>") > 0}
    for case in REFUSED.keys() - text_before:
        assert parse_tool_call_str(REFUSED[case][0], allow_reasoning=True).index is None, case


def test_tables_show_every_status():
    assert {status for _, status in REFUSED.values()} == {status.value for status in ParseStatus} - {"ok"}


def test_no_beginning_of_a_call_is_a_call():
    assert [length for length in range(len(CALL)) if parse_tool_call_str(CALL[:length]).index is not None] == []


def test_no_end_of_a_call_is_a_call():
    assert [start for start in range(1, len(CALL)) if parse_tool_call_str(CALL[start:]).index is not None] == []


def test_another_tool_name():
    text = make_tool_call_str(1, name="choose")
    assert text == '<tool_call>\n{"name": "choose", "arguments": {"index": 1}}\n</tool_call>'
    assert parse_tool_call_str(text, name="choose") == ParsedToolCall(ParseStatus.OK, 1)
    assert parse_tool_call_str(text) == ParsedToolCall(ParseStatus.WRONG_NAME)


def test_canonical_call_is_qwens_own_format():
    assert make_tool_call_str(2) == CALL


@pytest.mark.parametrize("index", [True, 1.0, "1", None], ids=repr)
def test_a_call_is_made_of_an_int_only(index):
    with pytest.raises(TypeError, match="needs an int"):
        make_tool_call_str(index)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Thinking ```json " + call_text(1), ParseStatus.OK),
        ("Thinking ```json\n" + call_text(1) + "\n```", ParseStatus.OK),
        ("Thinking " + call_text(1) + "\n```", ParseStatus.EXTRA_TEXT),
        ("x" * 5000, ParseStatus.NO_CALL),
        ("x" * 5000 + call_text(1), ParseStatus.OK),
    ],
)
def test_reasoning_may_end_in_a_fence_or_be_long(text, status):
    assert parse_tool_call_str(text, allow_reasoning=True).status is status
