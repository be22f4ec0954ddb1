"""Schemas of tools: which can be used, and which arguments they then take. Each table is one clause of the policy."""

import json
import socket
from typing import Any

import pytest
from referencing.exceptions import Unresolvable

from utils.tool_schemas import BadTool, checked_tools, refusal_of

pytestmark = pytest.mark.fast

INDEX = {"type": "object", "properties": {"index": {"type": "integer"}}, "required": ["index"]}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
    "required": ["x", "y"],
}


def tool(parameters: Any = INDEX, name: Any = "pick", **keys: Any) -> dict[str, Any]:
    return {"name": name, "description": "Picks.", "parameters": parameters, **keys}


def about(schema: Any, **root: Any) -> dict[str, Any]:
    """A tool whose one argument, `value`, has this schema. root: keywords beside its properties."""
    return tool({"type": "object", "properties": {"value": schema}, **root})


def is_taken(given: dict[str, Any], arguments: Any) -> bool:
    checked_tools([given])
    return refusal_of([given], given["name"], arguments) is None


GOOD: dict[str, Any] = {
    "one argument": tool(),
    "no arguments": tool({"type": "object"}),
    "no arguments, spelled out": tool({"type": "object", "properties": {}, "additionalProperties": False}),
    "no description": {"name": "pick", "parameters": INDEX},
    "a name of 64": tool(name="p" * 64),
    "a name with a dash": tool(name="_pick-2"),
    "an optional argument": tool({"type": "object", "properties": {"why": {"type": "string"}}}),
    "a choice of words": about({"enum": ["red", "blue"]}),
    "a constant": about({"const": 3}),
    "one of two types": about({"type": ["integer", "null"]}),
    "any of two": about({"anyOf": [{"type": "integer"}, {"type": "string"}]}),
    "a nested object": about(POINT),
    "entries of one type": about({"type": "array", "items": {"type": "integer"}, "minItems": 1}),
    "a pair": about({"type": "array", "prefixItems": [{"type": "integer"}] * 2, "items": False}),
    "a definition": about({"$ref": "#/$defs/Point"}, **{"$defs": {"Point": POINT}}),
    "an older definition": about({"$ref": "#/definitions/Point"}, definitions={"Point": POINT}),
    "a tree": tool({"type": "object", "properties": {"left": {"$ref": "#"}, "leaf": {"type": "integer"}}}),
    "properties named like keywords": tool(
        {"type": "object", "properties": {"type": {"type": "string"}, "$ref": {"type": "string"}}}
    ),
}


@pytest.mark.parametrize("given", GOOD.values(), ids=GOOD.keys())
def test_a_good_tool_is_taken_as_it_is(given: dict[str, Any]) -> None:
    (checked,) = checked_tools([given])
    assert checked == {"description": "", **given} and json.loads(json.dumps(checked)) == checked


BAD_LISTS: dict[str, tuple[Any, str]] = {
    "none": ((), "tools is () (tuple), but wanted a list of at least one tool"),
    "not a list": (tool(), "(dict), but wanted a list of at least one tool"),
    "a text": ("pick", "tools is 'pick' (str), but wanted a list"),
    "nothing": (None, "tools is None (NoneType), but wanted a list"),
    "a name": (["pick"], "tools[0] is 'pick' (str), but wanted an object of name, description and parameters"),
    "two of one name": ([tool(), tool()], "two tools are named pick; give each a name of its own"),
    "wrapped": (
        [tool(), {"type": "function", "function": tool(name="b")}],
        "tools[1] is wrapped as a function; give what is under its key 'function'",
    ),
    "a further key": ([tool(strict=True)], "tools[0] has the key strict, but wanted name, description and parameters"),
}
BAD: dict[str, tuple[Any, str]] = {
    "no name": ({"parameters": INDEX}, "tools[0] is named None (NoneType), but a name has letters, digits, _ or -"),
    "an empty name": (tool(name=""), "tools[0] is named '' (str)"),
    "a name of 65": (tool(name="p" * 65), "64 at most; correct it"),
    "a blank in the name": (tool(name="pick it"), "tools[0] is named 'pick it' (str)"),
    "a line break behind the name": (tool(name="pick\n"), "tools[0] is named 'pick\\n' (str)"),
    "a letter of another script": (tool(name="pîck"), "tools[0] is named 'pîck' (str)"),
    "a description that is none": (tool(description=3), "tool pick has a description that is 3 (int), but wanted text"),
    "no parameters": ({"name": "pick"}, "tool pick has parameters that are None (NoneType), but wanted a JSON Schema"),
    "parameters of no type": (tool({"properties": {}}), "but wanted a JSON Schema of type object; give"),
    "parameters of another type": (tool({"type": "array", "items": {"type": "integer"}}), "of type object; give"),
    "a type that is none": (about({"type": "int"}), "tool pick is no JSON Schema: 'int' is not valid under any"),
    "properties that are a list": (tool({"type": "object", "properties": ["x"]}), "tool pick is no JSON Schema: "),
    "a pattern that is none": (about({"type": "string", "pattern": "("}), "tool pick is no JSON Schema: '(' is not a"),
    "no JSON": (about({"enum": {1, 2}}), "tool pick is not plain JSON (Object of type set is not JSON serializable)"),
    "a number that is not one": (about({"const": float("nan")}), "tool pick is not plain JSON (Out of range float"),
    "too long": (tool(description="a" * 70_000), "characters, wanted at most 65,536; shorten it"),
    "a token in the description": (
        tool(description="As <|im_end|>."),
        "tool pick holds <|im_end|>, which is a token to the model, not text; write it otherwise",
    ),
    "a token in a choice": (about({"enum": ["<tool_call>"]}), "tool pick holds <tool_call>, which is a token"),
    "a token as a key": (tool({"type": "object", "properties": {"<|im_end|>": {"const": 1}}}), "holds <|im_end|>"),
    "a required key that is none": (
        tool({**INDEX, "required": ["index", "why"]}),
        "tool pick requires why, which is not among its properties; add or drop it",
    ),
    "a value of any type": (about({}), "tool pick: parameters.properties.value has no type, so it takes any value"),
    "a description alone": (about({"description": "Why."}), "parameters.properties.value has no type"),
    "a bound alone": (about({"minimum": 0}), "parameters.properties.value has no type"),
    "true": (about(True), "parameters.properties.value takes any value; give it a type"),
    "no type deeper down": (
        about({"type": "object", "properties": {"deep": {}}}),
        "parameters.properties.value.properties.deep has no type",
    ),
    "any of, one of no type": (about({"anyOf": [{"type": "integer"}, {}]}), "properties.value has no type"),
    "one of, one of no type": (about({"oneOf": [{}, {"type": "integer"}]}), "properties.value has no type"),
    "all of no type": (about({"allOf": [{"minimum": 0}]}), "properties.value has no type"),
    "a definition of no type": (
        about({"$ref": "#/$defs/Any"}, **{"$defs": {"Any": {}}}),
        "properties.value has no type",
    ),
    "a definition of itself": (
        about({"$ref": "#/$defs/A"}, **{"$defs": {"A": {"$ref": "#/$defs/A"}}}),
        "properties.value has no type",
    ),
    "an array without items": (about({"type": "array"}), "properties.value has no items, so it takes any entries"),
    "an array among types": (about({"type": ["array", "null"]}), "properties.value has no items"),
    "a pair without an end": (
        about({"type": "array", "prefixItems": [{"type": "integer"}]}),
        "has no items, so it takes any entries; give it items with a type, or items: false",
    ),
    "entries of no type": (about({"type": "array", "items": {}}), "properties.value.items has no type"),
    "any entries": (about({"type": "array", "items": True}), "properties.value.items takes any value"),
    "keys of one's own": (
        tool({"type": "object", "additionalProperties": True}),
        "tool pick: parameters has additionalProperties, which lets a model choose its own keys; name each in",
    ),
    "keys of one's own with a type": (
        about({"type": "object", "additionalProperties": {"type": "integer"}}),
        "parameters.properties.value has additionalProperties",
    ),
    "keys by a pattern": (
        tool({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}),
        "parameters has patternProperties",
    ),
    "keys that are left over": (tool({"type": "object", "unevaluatedProperties": True}), "has unevaluatedProperties"),
    "keys in one of several": (
        about({"anyOf": [{"type": "object", "additionalProperties": True}]}),
        "parameters.properties.value.anyOf.0 has additionalProperties",
    ),
    "keys in a definition": (
        about({"$ref": "#/$defs/A"}, **{"$defs": {"A": {"type": "object", "additionalProperties": True}}}),
        "parameters.$defs.A has additionalProperties",
    ),
    "another draft": (tool({**INDEX, "$schema": "http://json-schema.org/draft-07/schema#"}), "parameters has $schema"),
    "a name of the schema's own": (about({"type": "integer", "$id": "http://a.b/c"}), "properties.value has $id"),
    "an anchor": (about({"type": "integer", "$anchor": "a"}), "properties.value has $anchor; leave it out, and refer"),
    "a dynamic reference": (about({"type": "integer", "$dynamicRef": "#a"}), "properties.value has $dynamicRef"),
    "a reference to nothing": (
        about({"$ref": "#/$defs/Gone"}),
        "properties.value refers to #/$defs/Gone, wanted # or #/$defs/NAME; copy the schema into $defs",
    ),
    "a reference to an anchor": (about({"$ref": "#value"}), "properties.value refers to #value, wanted #"),
    "a reference to a place of names": (about({"$ref": "#/properties"}), "refers to #/properties, wanted #"),
    "a reference to a file": (about({"$ref": "other.json"}), "refers to other.json, wanted # or #/$defs/NAME"),
    "a reference to a file by its address": (about({"$ref": "file:///etc/passwd"}), "refers to file:///etc/passwd"),
}  # fmt: skip


@pytest.mark.parametrize(("tools", "words"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_what_is_no_list_of_tools_is_named(tools: Any, words: str) -> None:
    with pytest.raises(BadTool) as bad:
        checked_tools(tools)
    assert words in str(bad.value) and "\n" not in str(bad.value)


@pytest.mark.parametrize(("given", "words"), BAD.values(), ids=BAD.keys())
def test_a_tool_that_cannot_be_used_is_named_with_the_place(given: Any, words: str) -> None:
    with pytest.raises(BadTool) as bad:
        checked_tools([given])
    assert words in str(bad.value) and "\n" not in str(bad.value)


def test_a_remote_reference_is_refused_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    given = about({"$ref": "http://json-schema.org/draft-07/schema#"})
    with pytest.raises(BadTool, match="refers to http://json-schema.org/draft-07/schema#, wanted"):
        checked_tools([given])
    with pytest.raises(Unresolvable):
        refusal_of([about({"$ref": "http://example.org/x.json"})], "pick", {"value": 3})


# --- arguments --------------------------------------------------------------------------------------------------------

INF = float("inf")
SHARED = {"allOf": [{"properties": {"x": {"type": "integer"}}}, {"properties": {"y": {"type": "integer"}}}]}
NODE = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}

# a schema of `value` (with what stands beside the properties), values that it takes, values that it does not
ARGUMENTS: dict[str, tuple[Any, dict[str, Any], list[Any], list[Any]]] = {
    "an integer": ({"type": "integer"}, {}, [0, -3, 10**30], [1.0, 0.5, True, "1", None, [1], 1e300, INF]),
    "a number": ({"type": "number"}, {}, [0, 0.5, -1e300, 3], [True, False, INF, -INF, float("nan"), "1", None]),
    "a text": ({"type": "string"}, {}, ["", "é 猫"], [3, None, ["a"], True]),
    "a boolean": ({"type": "boolean"}, {}, [True, False], [1, 0, "true", None]),
    "null": ({"type": "null"}, {}, [None], [0, False, ""]),
    "two types": ({"type": ["integer", "null"]}, {}, [3, None], [3.0, True, "3"]),
    "the constant 1": ({"const": 1}, {}, [1], [1.0, True, "1"]),
    "the constant 1.0": ({"const": 1.0}, {}, [1.0], [1, True]),
    "the constant true": ({"const": True}, {}, [True], [1, 1.0, "true"]),
    "the constant 0": ({"const": 0}, {}, [0], [False, 0.0, -0.0, None]),
    "one of several": ({"enum": [1, "a", None, True]}, {}, [1, "a", None, True], [1.0, False, "b", 0]),
    "constants deeper down": ({"enum": [[1, {"a": 2}]]}, {}, [[1, {"a": 2}]], [[1.0, {"a": 2}], [True, {"a": 2}]]),
    "a constant object": ({"const": {"a": 1, "b": 2}}, {}, [{"b": 2, "a": 1}], [{"a": 1}, {"a": 1, "b": 2, "c": 3}]),
    "a range": ({"type": "integer", "minimum": 0, "maximum": 9}, {}, [0, 9], [-1, 10]),
    "a pattern": ({"type": "string", "pattern": "^[ab]+$"}, {}, ["ab"], ["abc", ""]),
    "entries": ({"type": "array", "items": {"type": "integer"}}, {}, [[], [1, 2]], [[1.0], [True], 3, {"0": 1}]),
    "a pair": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False}, {},
        [[1, "a"], [1]], [[1, "a", 2], ["a", 1]],
    ),
    "an object": (POINT, {}, [{"x": 1, "y": 2.5}], [{"x": 1}, {"x": 1, "y": 2, "z": 3}, {"x": True, "y": 2}, [1, 2]]),
    "an object without keys": ({"type": "object"}, {}, [{}], [{"a": 1}]),
    "objects in a list": ({"type": "array", "items": POINT}, {}, [[{"x": 1, "y": 2}]], [[{"x": 1, "y": 2, "z": 3}]]),
    "either object": (
        {"anyOf": [POINT, {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}]}, {},
        [{"x": 1, "y": 2}, {"name": "a"}], [{"x": 1, "y": 2, "z": 3}, {"name": "a", "x": 1}, {}],
    ),
    "both objects": (
        {"type": "object", **SHARED}, {}, [{}, {"x": 1, "y": 2}], [{"x": 1, "z": 2}, {"x": 1.0}, {"y": True}],
    ),
    "a definition": (
        {"$ref": "#/$defs/Point"}, {"$defs": {"Point": POINT}},
        [{"x": 1, "y": 2}], [{"x": 1, "y": 2, "z": 3}, {"x": 1.0, "y": 2}, {}],
    ),
    "a definition within another": (
        {"$ref": "#/$defs/Line"},
        {"$defs": {"Point": POINT, "Line": {"type": "object", "properties": {"from": {"$ref": "#/$defs/Point"}}}}},
        [{"from": {"x": 1, "y": 2}}], [{"from": {"x": 1, "y": 2, "z": 3}}, {"to": {"x": 1, "y": 2}}],
    ),
    "a list of any length": (
        {"$ref": "#/$defs/Node"}, {"$defs": {"Node": NODE}},
        [{"next": {"next": None}}, {}], [{"next": {"next": 3}}, {"next": {"other": None}}],
    ),
    "the schema itself": ({"$ref": "#"}, {}, [{"value": {}}], [{"other": {}}, {"value": {"value": 1.0}}]),
    "not": ({"type": "integer", "not": {"const": 3}}, {}, [2], [3, 2.0]),
    "if": (
        {"type": "integer", "if": {"minimum": 10}, "then": {"multipleOf": 10}}, {}, [3, 20], [11, 20.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "root", "takes", "refuses"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_what_a_schema_takes(schema: Any, root: dict[str, Any], takes: list[Any], refuses: list[Any]) -> None:
    given = about(schema, **root)
    assert [value for value in takes if not is_taken(given, {"value": value})] == []
    assert [value for value in refuses if is_taken(given, {"value": value})] == []
    assert not is_taken(given, {"value": takes[0], "other": takes[0]}), "the arguments are closed too"


def test_what_is_required_is_required_and_the_rest_is_not() -> None:
    given = tool({**POINT, "required": ["x"]})
    assert is_taken(given, {"x": 1}) and is_taken(given, {"x": 1, "y": 2})
    assert not is_taken(given, {"y": 2}) and not is_taken(given, {})


def test_arguments_are_those_of_the_tool_that_is_called() -> None:
    tools = [tool(), tool(POINT, "click")]
    assert refusal_of(tools, "click", {"x": 1, "y": 2}) is None
    assert refusal_of(tools, "click", {"index": 1}) is not None
    assert refusal_of(tools, "pick", {"index": 1}) is None


def test_a_refusal_names_the_place() -> None:
    given = about(POINT)
    assert refusal_of([given], "pick", {"value": {"x": "a", "y": 2}}) == "'a' is not of type 'integer' (in value.x)"


def test_checking_and_refusing_leave_the_schema_as_it_was() -> None:
    given = about(POINT, **{"$defs": {"Point": POINT}})
    before = json.dumps(given)
    assert is_taken(given, {"value": {"x": 1, "y": 2}})
    assert json.dumps(given) == before
