"""Tool calls as text: the writer of one, and the only code that reads model output.

Strict on purpose. A policy can learn to earn reward with every string that a lenient parser accepts beyond the
canonical call. So nothing is repaired: a completion is exactly one call, or it has a status that says why not.
"""

import json
import re
from dataclasses import dataclass
from enum import StrEnum

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"
MAX_CALL_CHARS = 4096
MAX_JSON_DEPTH = 8

_BLANKS = " \t\r\n"
_FENCE_OPEN, _FENCE_CLOSE = "```json", "```"
# the closing quote is optional, so that an unterminated string is passed over once and the scan stays linear
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)


class ParseStatus(StrEnum):
    """The reason why a completion is, or is not, a tool call. Each status is a logged rate."""

    OK = "ok"
    NO_CALL = "no_call"  # no opening wrapper at all
    MULTIPLE_CALLS = "multiple_calls"  # a second opening wrapper, anywhere
    EXTRA_TEXT = "extra_text"  # something before or after the one call
    MALFORMED_JSON = "malformed_json"  # wrapper not closed, or its inside is not one JSON object with unique keys
    WRONG_NAME = "wrong_name"  # the call names no tool, or another one
    BAD_ARGUMENTS = "bad_arguments"  # not exactly {"index": <integer>}, or a third key beside name and arguments
    TOO_LONG = "too_long"  # over 4,096 characters, or nested deeper than 8; refused before JSON sees it


@dataclass(frozen=True)
class ParsedToolCall:
    """The result of parsing. `index` is an int exactly when `status` is OK; the environment checks its range."""

    status: ParseStatus
    index: int | None = None


def make_tool_call_str(index: int, name: str = "pick_image") -> str:
    """The canonical call, in the format Qwen2.5 was trained on.

    index: the argument; any int, but not a bool. Raises TypeError otherwise.

    >>> print(make_tool_call_str(2))
    <tool_call>
    {"name": "pick_image", "arguments": {"index": 2}}
    </tool_call>
    """
    if type(index) is not int:
        raise TypeError(f"index={index!r} is a {type(index).__name__}, but a tool call needs an int; pass int(index)")
    return f"{CALL_OPEN}\n{json.dumps({'name': name, 'arguments': {'index': index}})}\n{CALL_CLOSE}"


def parse_tool_call_str(text: str, name: str = "pick_image", *, allow_reasoning: bool = False) -> ParsedToolCall:
    """The one tool call that `text` consists of, or the status that says why not. Never raises, never repairs.

    text: a whole completion without its end-of-turn token. Blanks around the call and one ```` ```json ```` fence
    around the wrapper are accepted. With `allow_reasoning`, any text before the wrapper is accepted too, and only
    what follows it counts towards the length limit; text after the call is refused all the same.

    >>> parse_tool_call_str('<tool_call>{"name": "pick_image", "arguments": {"index": 2}}</tool_call>').index
    2
    >>> parse_tool_call_str("I pick 2").status.value
    'no_call'
    """
    if allow_reasoning:
        text = _without_reasoning(text)
    if len(text) > MAX_CALL_CHARS:
        return ParsedToolCall(ParseStatus.TOO_LONG)
    num_opened = text.count(CALL_OPEN)
    if num_opened == 0:
        return ParsedToolCall(ParseStatus.NO_CALL)
    if num_opened > 1:
        return ParsedToolCall(ParseStatus.MULTIPLE_CALLS)
    before, _, rest = _without_fence(text.strip(_BLANKS)).partition(CALL_OPEN)
    if before:
        return ParsedToolCall(ParseStatus.EXTRA_TEXT)
    inside, closed, after = rest.partition(CALL_CLOSE)
    if not closed:
        return ParsedToolCall(ParseStatus.MALFORMED_JSON)
    if after:
        return ParsedToolCall(ParseStatus.EXTRA_TEXT)
    return _parse_call_json(inside, name)


def _without_reasoning(text: str) -> str:
    """The text from the wrapper on, which is judged if reasoning is allowed; with its fence if that is closed."""
    reasoning, opened, rest = text.partition(CALL_OPEN)
    has_fence = reasoning.rstrip(_BLANKS).endswith(_FENCE_OPEN) and rest.rstrip(_BLANKS).endswith(_FENCE_CLOSE)
    return (_FENCE_OPEN if has_fence else "") + opened + rest


def _without_fence(text: str) -> str:
    is_fenced = text.startswith(_FENCE_OPEN) and text.endswith(_FENCE_CLOSE) and text.count(_FENCE_CLOSE) == 2
    return text[len(_FENCE_OPEN) : -len(_FENCE_CLOSE)].strip(_BLANKS) if is_fenced else text


def _parse_call_json(inside: str, name: str) -> ParsedToolCall:
    if _json_depth(inside) > MAX_JSON_DEPTH:
        return ParsedToolCall(ParseStatus.TOO_LONG)
    try:
        call = json.loads(inside, object_pairs_hook=object_with_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return ParsedToolCall(ParseStatus.MALFORMED_JSON)
    if not isinstance(call, dict):
        return ParsedToolCall(ParseStatus.MALFORMED_JSON)
    if call.get("name") != name:
        return ParsedToolCall(ParseStatus.WRONG_NAME)
    arguments = call.get("arguments")
    if set(call) != {"name", "arguments"} or not isinstance(arguments, dict) or set(arguments) != {"index"}:
        return ParsedToolCall(ParseStatus.BAD_ARGUMENTS)
    index = arguments["index"]
    # bool is a subclass of int and 1.0 == 1, so only the exact type will do
    if type(index) is not int:
        return ParsedToolCall(ParseStatus.BAD_ARGUMENTS)
    return ParsedToolCall(ParseStatus.OK, index)


def _json_depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, in time linear in the length."""
    depth = deepest = 0
    for char in _JSON_STRING.sub("", text):
        if char in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "}]":
            depth -= 1
    return deepest


def object_with_unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of a JSON text's pairs. Raises ValueError, which names the key, for one that is given twice."""
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} is given twice")
        values[key] = value
    return values


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
