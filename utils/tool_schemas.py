"""The schemas of an environment's tools: checked once, then the arguments of every call against them.

Arguments are validated by jsonschema (JSON Schema 2020-12), with a stricter policy on top, because a policy can learn
to earn reward with whatever a lenient check lets through:

- Objects are closed: a key that the schema does not name is refused, without `additionalProperties` being written.
- An integer is an int (JSON Schema takes 1.0), a number is finite, True is no number, and 1.0 is not the constant 1.
- A `$ref` is `#` or `#/$defs/NAME`, so nothing is ever read from a file or a network.
- No part takes any value: each has a type, in every way of fitting it.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from utils.plain_text import QWEN_ADDED_TOKENS, first_literal

Tool = Mapping[str, Any]  # JSON: name, description, parameters

TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
# the keywords under which schemas stand: true for those about a part of the instance, not about the same one again
KEYWORDS = {
    **dict.fromkeys(("properties", "items", "prefixItems", "contains"), True),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$defs", "definitions"), False),
}
BY_NAME = ("properties", "$defs", "definitions")
# keywords that would open an object to keys of the model's own choice
OPENING = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "dependentSchemas")
# keywords that would name or choose another schema than the one that is written
REFERRING = ("$schema", "$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$vocabulary")
REFERENCE = re.compile(r"#/(\$defs|definitions)/([^/~%]+)")
MAX_SCHEMA_CHARS = 65_536


class BadTool(ValueError):
    """A tool's schema cannot be used. One line: the tool, the place, got, wanted, remedy."""


def checked_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """The tools as plain JSON objects of name, description and parameters. Raises BadTool for any that is unfit."""
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence) or not tools:
        raise BadTool(
            f"tools is {_shown(tools)}, but wanted a list of at least one tool; give it objects of name, description "
            "and parameters"
        )
    checked = tuple(_checked_tool(tool, place) for place, tool in enumerate(tools))
    names = [tool["name"] for tool in checked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadTool(f"two tools are named {twice[0]}; give each a name of its own")
    return checked


def refusal_of(tools: Sequence[Tool], name: str, arguments: Mapping[str, Any]) -> str | None:
    """The reason why these are no arguments of the tool of this name, in words; None if they are.

    tools: as `checked_tools` takes them; name: of one of them.

    >>> index = {"type": "object", "properties": {"index": {"type": "integer"}}, "required": ["index"]}
    >>> refusal_of([{"name": "pick", "parameters": index}], "pick", {"index": 1.0})
    "1.0 is not of type 'integer' (in index)"
    """
    error = next(_validator(_as_json([dict(tool) for tool in tools]), name).iter_errors(arguments), None)
    if error is None:
        return None
    place = ".".join(map(str, error.absolute_path))
    return f"{error.message[:200]}{f' (in {place})' if place else ''}"


def _checked_tool(tool: Any, place: int) -> dict[str, Any]:
    """The tool as a plain JSON object. Raises BadTool."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if not isinstance(tool, Mapping):
        raise BadTool(f"tools[{place}] is {_shown(tool)}, but wanted an object of name, description and parameters")
    if tool.get("type") == "function" and "function" in tool:
        raise BadTool(f"tools[{place}] is wrapped as a function; give what is under its key 'function'")
    if unknown := sorted(map(str, tool.keys() - {"name", "description", "parameters"})):
        raise BadTool(f"tools[{place}] has the key {unknown[0]}, but wanted name, description and parameters alone")
    name = tool.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise BadTool(
            f"tools[{place}] is named {_shown(name)}, but a name has letters, digits, _ or -, 64 at most; correct it"
        )
    try:
        text = json.dumps(dict(tool), allow_nan=False)
        plain = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadTool(f"tool {name} is not plain JSON ({error}); write its schema in dicts, lists and texts") from error
    if len(text) > MAX_SCHEMA_CHARS:
        raise BadTool(f"tool {name} has {len(text):,} characters, wanted at most {MAX_SCHEMA_CHARS:,}; shorten it")
    if not isinstance(plain.setdefault("description", ""), str):
        raise BadTool(f"tool {name} has a description that is {_shown(plain['description'])}, but wanted text")
    if (literal := first_literal(text, QWEN_ADDED_TOKENS)) is not None:
        raise BadTool(f"tool {name} holds {literal}, which is a token to the model, not text; write it otherwise")
    parameters = plain.get("parameters")
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise BadTool(
            f"tool {name} has parameters that are {_shown(parameters)}, but wanted a JSON Schema of type object; give "
            '{"type": "object", "properties": {...}, "required": [...]}'
        )
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path))
        raise BadTool(f"tool {name} is no JSON Schema: {error.message[:200]} (in {where}); correct it") from error
    for schema, where, is_about_a_part in _subschemas(parameters, "parameters"):
        _require_strict(schema, f"tool {name}: {where}", parameters, is_about_a_part=is_about_a_part)
    wanting = set(parameters.get("required", ())) - parameters.get("properties", {}).keys()
    if wanting:
        raise BadTool(f"tool {name} requires {min(wanting)}, which is not among its properties; add or drop it")
    return plain


def _require_strict(schema: Any, where: str, root: dict[str, Any], *, is_about_a_part: bool) -> None:
    """Raises BadTool if a schema in the schema `root` takes any value, opens an object, or refers to another place."""
    if not isinstance(schema, dict):
        if schema is True:
            raise BadTool(f"{where} takes any value; give it a type")
        return
    for reference in [schema["$ref"]] if "$ref" in schema else ():
        if _referred(reference, root) is None:
            raise BadTool(f"{where} refers to {reference}, wanted # or #/$defs/NAME; copy the schema into $defs")
    if is_about_a_part and not _says_a_type(schema, root):
        raise BadTool(f"{where} has no type, so it takes any value; give it one")
    if "array" in schema.get("type", ()) and "items" not in schema:
        raise BadTool(f"{where} has no items, so it takes any entries; give it items with a type, or items: false")
    for keyword in OPENING:
        if schema.get(keyword, False) is not False:
            raise BadTool(f"{where} has {keyword}, which lets a model choose its own keys; name each in properties")
    if odd := schema.keys() & set(REFERRING):
        raise BadTool(f"{where} has {min(odd)}; leave it out, and refer to #/$defs/NAME alone")


def _referred(reference: str, root: dict[str, Any]) -> Any:
    """The schema that a reference in the schema `root` names; None if it has another form, or names none."""
    if reference == "#":
        return root
    named = REFERENCE.fullmatch(reference)
    return root.get(named[1], {}).get(named[2]) if named else None


def _says_a_type(schema: Any, root: dict[str, Any], above: tuple[str, ...] = ()) -> bool:
    """True if every value that fits the schema fits a type, an enum or a const. above: the references that led here."""
    if not isinstance(schema, dict) or schema.keys() & {"type", "enum", "const"}:
        return schema is not True
    reference = str(schema.get("$ref", ""))
    is_new = reference != "" and reference not in above
    if is_new and _says_a_type(_referred(reference, root), root, (*above, reference)):
        return True
    either = [schema[keyword] for keyword in ("anyOf", "oneOf") if keyword in schema]
    return any(_says_a_type(one, root, above) for one in schema.get("allOf", ())) or any(
        all(_says_a_type(one, root, above) for one in options) for options in either
    )


def _subschemas(schema: Any, where: str, *, is_about_a_part: bool = True) -> Iterator[tuple[Any, str, bool]]:
    """(schema, its place, true if it is about a part of the instance) of each schema in a schema, itself first."""
    yield schema, where, is_about_a_part
    for key, name, inner, is_part in _inner(schema):
        place = f"{where}.{key}" if name is None else f"{where}.{key}.{name}"
        yield from _subschemas(inner, place, is_about_a_part=is_part)


def _inner(schema: Any) -> Iterator[tuple[str, Any, Any, bool]]:
    """(keyword, name or number under it if any, schema, true if it is about a part) of each schema in this one."""
    for keyword, is_part in KEYWORDS.items() if isinstance(schema, dict) else ():
        inner = schema.get(keyword)
        if keyword in schema and not isinstance(inner, list) and keyword not in BY_NAME:
            yield keyword, None, inner, is_part
        named = inner.items() if isinstance(inner, dict) and keyword in BY_NAME else enumerate(inner or ())
        if isinstance(inner, list) or keyword in BY_NAME:
            yield from ((keyword, name, one, is_part) for name, one in named)


def _closed(schema: Any, *, is_about_a_part: bool = True) -> Any:
    """The schema whose objects take the keys alone that it names for them.

    is_about_a_part: false for a schema beside others about the same instance, which name its keys together.
    """
    if not isinstance(schema, dict):
        return schema
    closed = {**schema, **{key: dict(schema[key]) for key in BY_NAME if key in schema}}
    for keyword, name, inner, is_part in _inner(schema):
        sealed = _closed(inner, is_about_a_part=is_part)
        if name is None:
            closed[keyword] = sealed
        else:
            closed[keyword] = closed[keyword] if closed[keyword] is not schema[keyword] else list(schema[keyword])
            closed[keyword][name] = sealed
    # a constant names its keys itself
    is_sealed = is_about_a_part and not schema.keys() & {"enum", "const"}
    return closed | ({"unevaluatedProperties": False} if is_sealed else {})


@lru_cache
def _validator(tools_json: str, name: str) -> Any:
    """The validator of one tool's arguments."""
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend
    from referencing import Registry

    def is_one_of(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
        options = wanted if "enum" in schema and wanted is schema["enum"] else [wanted]
        if _as_json(instance) not in map(_as_json, options):
            yield ValidationError(f"{instance!r} is not one of {options!r}")

    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda checker, value: type(value) is int,
            "number": lambda checker, value: type(value) is int or (type(value) is float and math.isfinite(value)),
        }
    )
    strict = extend(Draft202012Validator, {"enum": is_one_of, "const": is_one_of}, type_checker=types)
    parameters = next(tool["parameters"] for tool in json.loads(tools_json) if tool["name"] == name)
    # an empty registry retrieves nothing
    return strict(_closed(parameters), registry=Registry())


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({type(value).__name__})"
