"""JSON schemas as grammars can follow them: annotations are left out, what would be cut is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from loraserve.errors import InvalidRequestError

# Those that JSON Schema defines; a grammar follows some, and refuses the others. Any other is a note.
DEFINED_FORMATS: Final = frozenset(
    {
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname"),
        *("ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template"),
        *("json-pointer", "relative-json-pointer", "regex"),
    }
)
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SCHEMAS = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not")
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS_IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")


def forcible_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without formats that are notes for people ("password", "int32", names of one's own).

    Raises:
        InvalidRequestError: an integer is beyond 64 bits, in which grammars count.
    """
    forcible = dict(schema)
    if isinstance(kind := schema.get("format"), str) and kind not in DEFINED_FORMATS:
        del forcible["format"]
    if schema.get("type") != "number":
        for name in _BOUNDS:
            value = schema.get(name)
            if isinstance(value, int | float) and not -(2**63) <= value < 2**63:
                raise _beyond(name, value)
    for value in _values(schema):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise _beyond("const or enum", value)
    for name in _SCHEMAS:
        if isinstance(schema.get(name), Mapping):
            forcible[name] = forcible_schema(schema[name])
    for name in _SCHEMAS_BY_NAME:
        if isinstance(schema.get(name), Mapping):
            forcible[name] = {key: _forcible(one) for key, one in schema[name].items()}
    for name in _SCHEMAS_IN_LISTS:
        if isinstance(schema.get(name), list | tuple):
            forcible[name] = [_forcible(one) for one in schema[name]]
    return forcible


def _forcible(schema: Any) -> Any:
    return forcible_schema(schema) if isinstance(schema, Mapping) else schema


def _values(schema: Mapping[str, Any]) -> Sequence[Any]:
    values = schema.get("enum")
    values = list(values) if isinstance(values, list | tuple) else []
    return [*values, schema["const"]] if "const" in schema else values


def _beyond(name: str, value: float) -> InvalidRequestError:
    return InvalidRequestError(
        f"{name} of the schema is {value!r:.100}, beyond the 64 bits in which grammars count: leave it out"
    )
