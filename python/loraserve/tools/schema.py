"""What a tool's schema says of a parameter's type, for families that write values without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.tools.tool import Tool

ANY_TYPE = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_TYPES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (dict, "object"),
    (list, "array"),
    (type(None), "null"),
)


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """JSON types that a parameter may have; all where the schema does not say."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return ANY_TYPE
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), Sequence) and schema[name]:
            options = [one for one in schema[name] if isinstance(one, Mapping)]
            return frozenset().union(*(types_of(resolved(one, root), {}) for one in options))
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, Sequence):
        return frozenset(str(one) for one in kind)
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if isinstance(values, Sequence) and values and not isinstance(values, str):
        return frozenset(json_type(value) for value in values)
    return ANY_TYPE


def json_type(value: Any) -> str:
    """Of a parsed JSON value."""
    return next(name for kind, name in _TYPES if isinstance(value, kind))


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """What a reference into the root's definitions means; one that leads nowhere means anything."""
    for _ in range(8):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        found: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        schema = {} if found is None else found
    return {}


def parameter_types(tools: Sequence[Tool], tool: str, parameter: str) -> frozenset[str]:
    """Types of a tool's parameter, all where the tool says nothing of it."""
    for one in tools:
        if one.name == tool:
            root = one.parameters or {}
            properties = root.get("properties")
            return types_of(properties.get(parameter) if isinstance(properties, Mapping) else None, root)
    return ANY_TYPE


def coerced(text: str, types: frozenset[str]) -> str:
    """The JSON of a value written without quotes: of its type if it has one of them, else a string."""
    word = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text.strip())
    try:
        value = json.loads(word)
        kind = json_type(value)
        fits = kind in types or (kind == "integer" and "number" in types)
        if kind != "string" and (fits or "string" not in types):
            return (
                word if kind not in ("integer", "number") or abs(value) < float("inf") else json.dumps(text)
            )
        if kind == "string" and "string" not in types:
            return word
    except (ValueError, RecursionError):
        pass
    return json.dumps(text, ensure_ascii=False)
