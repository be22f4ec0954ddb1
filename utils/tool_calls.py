"""Tool calls as text: the writer of one, the prompt that asks for one, and the only code that reads model output.

Strict on purpose. A policy can learn to earn reward with every string that a lenient parser accepts beyond the
canonical call. So nothing is repaired: a completion is exactly one call, or it has a status that says why not.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from utils.plain_text import CALL_CLOSE, CALL_OPEN
from utils.tool_schemas import Tool, refusal_of

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
    BAD_ARGUMENTS = "bad_arguments"  # not what the tool's schema says, or a third key beside name and arguments
    TOO_LONG = "too_long"  # over 4,096 characters, or nested deeper than 8; refused before JSON sees it


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments, which are plain JSON."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """The call in a few words, as for a table: the value of a sole argument, else the arguments as JSON.

        >>> str(ToolCall("count", {"n": 3})), str(ToolCall("click", {"x": 3, "y": 4}))
        ('3', '{"x": 3, "y": 4}')
        """
        if len(self.arguments) == 1:
            (value,) = self.arguments.values()
            return value if isinstance(value, str) else _as_json(value)
        return _as_json(dict(self.arguments)) if self.arguments else self.name


@dataclass(frozen=True)
class ParsedCall:
    """The result of parsing. `call` is there exactly when `status` is OK, and fits its tool's schema."""

    status: ParseStatus
    call: ToolCall | None = None


@dataclass(frozen=True)
class ParsedToolCall:
    """The result of parsing. `index` is an int exactly when `status` is OK; the environment checks its range."""

    status: ParseStatus
    index: int | None = None


def make_call_str(call: ToolCall) -> str:
    """The canonical text of a call, in the format Qwen2.5 was trained on.

    Raises TypeError or ValueError for arguments that are not plain JSON, such as a NaN.

    >>> print(make_call_str(ToolCall("click", {"x": 3, "y": 4})))
    <tool_call>
    {"name": "click", "arguments": {"x": 3, "y": 4}}
    </tool_call>
    """
    return f"{CALL_OPEN}\n{_as_json({'name': call.name, 'arguments': dict(call.arguments)})}\n{CALL_CLOSE}"


def parse_call_str(text: str, tools: Sequence[Tool], *, allow_reasoning: bool = False) -> ParsedCall:
    """The one call that `text` consists of, or the status that says why not. Never raises, never repairs.

    text: a whole completion without its end-of-turn token. tools: as tool_schemas.checked_tools gives them. Blanks
    around the call and one ```` ```json ```` fence around the wrapper are accepted. With `allow_reasoning`, any text
    before the wrapper is accepted too, and only what follows it counts towards the length limit; text after the call is
    refused all the same. Arguments are exactly the keys and types of the tool's schema (policy: tool_schemas.py).
    """
    if allow_reasoning:
        text = _without_reasoning(text)
    if len(text) > MAX_CALL_CHARS:
        return ParsedCall(ParseStatus.TOO_LONG)
    num_opened = text.count(CALL_OPEN)
    if num_opened == 0:
        return ParsedCall(ParseStatus.NO_CALL)
    if num_opened > 1:
        return ParsedCall(ParseStatus.MULTIPLE_CALLS)
    before, _, rest = _without_fence(text.strip(_BLANKS)).partition(CALL_OPEN)
    if before:
        return ParsedCall(ParseStatus.EXTRA_TEXT)
    inside, closed, after = rest.partition(CALL_CLOSE)
    if not closed:
        return ParsedCall(ParseStatus.MALFORMED_JSON)
    if after:
        return ParsedCall(ParseStatus.EXTRA_TEXT)
    return _parse_call_json(inside, tools)


def system_text(tools: Sequence[Tool], *, allow_reasoning: bool = False) -> str:
    """The tools' schemas and the form of a call, for a system message. allow_reasoning: asks for text before it."""
    strict = "Reply with exactly one call and nothing else, in this form:"
    lenient = "Think first if it helps, then end your reply with exactly one call, in this form:"
    rule = lenient if allow_reasoning else strict
    opening = "You have one tool:" if len(tools) == 1 else f"You have {len(tools)} tools, of which you call one:"
    forms = [f"{CALL_OPEN}\n{_form_of(tool)}\n{CALL_CLOSE}" for tool in tools]
    return "\n".join([opening, *(_as_json(dict(tool)) for tool in tools), rule, "\nor\n".join(forms)])


def index_tool(name: str, description: str = "") -> dict[str, Any]:
    """The schema of a tool whose one argument is `index`, an integer."""
    parameters = {"type": "object", "properties": {"index": {"type": "integer"}}, "required": ["index"]}
    return {"name": name, "description": description, "parameters": parameters}


def make_tool_call_str(index: int, name: str = "pick_image") -> str:
    """The canonical call of an index tool.

    index: the argument; any int, but not a bool. Raises TypeError otherwise.

    >>> print(make_tool_call_str(2))
    <tool_call>
    {"name": "pick_image", "arguments": {"index": 2}}
    </tool_call>
    """
    if type(index) is not int:
        raise TypeError(f"index={index!r} is a {type(index).__name__}, but a tool call needs an int; pass int(index)")
    return make_call_str(ToolCall(name, {"index": index}))


def parse_tool_call_str(text: str, name: str = "pick_image", *, allow_reasoning: bool = False) -> ParsedToolCall:
    """The one call of an index tool that `text` consists of, as parse_call_str reads it.

    >>> parse_tool_call_str('<tool_call>{"name": "pick_image", "arguments": {"index": 2}}</tool_call>').index
    2
    >>> parse_tool_call_str("I pick 2").status.value
    'no_call'
    """
    parsed = parse_call_str(text, [index_tool(name)], allow_reasoning=allow_reasoning)
    return ParsedToolCall(parsed.status, None if parsed.call is None else parsed.call.arguments["index"])


def _form_of(tool: Tool) -> str:
    """A call of the tool with a word for its type in place of each value."""
    properties = tool["parameters"].get("properties", {})
    values = ", ".join(f"{_as_json(name)}: {_word_for(schema)}" for name, schema in properties.items())
    return f'{{"name": "{tool["name"]}", "arguments": {{{values}}}}}'


def _word_for(schema: Any) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    words = {"integer": "NUMBER", "number": "NUMBER", "string": '"TEXT"', "boolean": "TRUE OR FALSE", "array": "[...]"}
    return words.get(kind, "VALUE") if isinstance(kind, str) else "VALUE"


def _without_reasoning(text: str) -> str:
    """The text from the wrapper on, which is judged if reasoning is allowed; with its fence if that is closed."""
    reasoning, opened, rest = text.partition(CALL_OPEN)
    has_fence = reasoning.rstrip(_BLANKS).endswith(_FENCE_OPEN) and rest.rstrip(_BLANKS).endswith(_FENCE_CLOSE)
    return (_FENCE_OPEN if has_fence else "") + opened + rest


def _without_fence(text: str) -> str:
    is_fenced = text.startswith(_FENCE_OPEN) and text.endswith(_FENCE_CLOSE) and text.count(_FENCE_CLOSE) == 2
    return text[len(_FENCE_OPEN) : -len(_FENCE_CLOSE)].strip(_BLANKS) if is_fenced else text


def _parse_call_json(inside: str, tools: Sequence[Tool]) -> ParsedCall:
    if _json_depth(inside) > MAX_JSON_DEPTH:
        return ParsedCall(ParseStatus.TOO_LONG)
    try:
        call = json.loads(inside, object_pairs_hook=object_with_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return ParsedCall(ParseStatus.MALFORMED_JSON)
    if not isinstance(call, dict):
        return ParsedCall(ParseStatus.MALFORMED_JSON)
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or name not in [tool["name"] for tool in tools]:
        return ParsedCall(ParseStatus.WRONG_NAME)
    if set(call) != {"name", "arguments"} or not isinstance(arguments, dict):
        return ParsedCall(ParseStatus.BAD_ARGUMENTS)
    try:
        if refusal_of(tools, name, arguments) is None:
            called = ToolCall(name, arguments)
            make_call_str(called).encode()
            return ParsedCall(ParseStatus.OK, called)
    # a schema's own arithmetic, such as multipleOf of a huge number; half a surrogate pair, which is no text
    except (ArithmeticError, ValueError, RecursionError):
        pass
    return ParsedCall(ParseStatus.BAD_ARGUMENTS)


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


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
