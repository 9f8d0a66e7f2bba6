"""Parameters one by one, each a value of its type: what the families share that write no JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.tools.lark import Lark
from loraserve.tools.schema import ANY_TYPE, resolved, types_of
from loraserve.tools.tool import Tool
from loraserve.validation.json_schema import forcible_schema

EMPTY = '""'  # Lark of no text
_CANT_FORCE = ("pattern", "format", "contentEncoding")  # of text without quotes
_CANT_FORCE_OF_ALL = (
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "dependentRequired",
    "dependentSchemas",
    "minProperties",
    "maxProperties",
    "patternProperties",
    "propertyNames",
    "$ref",
)


def parameters_of(tool: Tool, family: str) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """(name, schema, whether it is required) of what a forced call has.

    Raises:
        InvalidRequestError: a keyword of the schema that no grammar of this form can follow.
    """
    root = tool.parameters or {}
    for name in _CANT_FORCE_OF_ALL:
        if name in root:
            raise _cant(tool, family, f"{name!r} beside its properties")
    properties = root.get("properties") or {}
    required = root.get("required") or []
    if not isinstance(properties, Mapping) or not isinstance(required, Sequence):
        raise InvalidRequestError(f"tool {tool.name!r}: properties must be an object, required a list")
    for name in required:
        if name not in properties:
            raise _cant(tool, family, f"the required {name!r:.100} that is none of its properties")
    for name, schema in properties.items():
        yield name, schema if isinstance(schema, Mapping) else {}, name in required


def raw_value(lark: Lark, tool: Tool, family: str, name: str, schema: Mapping[str, Any], end: str) -> str:
    """Lark of a value where strings have no quotes, and of `end`, which stands behind it."""
    root = tool.parameters or {}
    schema = forcible_schema(resolved(schema, root))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            options = [raw_value(lark, tool, family, name, one, end) for one in schema[key]]
            return f"({' | '.join(options)})"
    types = types_of(schema, root)
    if "string" not in types:
        return f"{as_json_value(lark, root, schema)} {lark.marker(end)}"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        return f"({' | '.join(_constant(lark, value) for value in values)}) {lark.marker(end)}"
    for key in _CANT_FORCE:
        if key in schema:
            raise _cant(tool, family, f"{key!r} of parameter {name!r}")
    text = lark.text_with(end, _length(schema))
    if types in ({"string"}, ANY_TYPE):
        return text
    others = [kind for kind in schema["type"] if kind != "string"]
    return f"({text} | {as_json_value(lark, root, {**schema, 'type': others})} {lark.marker(end)})"


def _length(schema: Mapping[str, Any]) -> str:
    """How many characters, as regular expressions say it."""
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if not isinstance(least, int) or not isinstance(most, int | None):
        raise InvalidRequestError("minLength and maxLength of a schema must be integers")
    return "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"


def as_json_value(lark: Lark, root: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Lark of a value as JSON, with the definitions that its schema may refer to."""
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return lark.json({**definitions, **schema})


def _constant(lark: Lark, value: Any) -> str:
    return lark.text(value if isinstance(value, str) else json.dumps(value))


def sequence(lark: Lark, items: Sequence[tuple[str, bool]], separator: str) -> str:
    """Lark of items in order, those that are not required perhaps left out, with `separator` between."""
    first = others = EMPTY  # of what is left: where nothing has come yet, and where something has
    for item, is_required in reversed(items):
        with_item = f"{item} {others}"
        behind = f"{separator} {with_item}"
        first = lark.rule("first", with_item if is_required else f"{with_item} | {first}")
        others = lark.rule("others", behind if is_required else f"{behind} | {others}")
    return first


def _cant(tool: Tool, family: str, what: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"tool {tool.name!r}: calls of the form {family} can't be made to follow {what}: leave it "
        "out, or ask for no certain or strict call"
    )
