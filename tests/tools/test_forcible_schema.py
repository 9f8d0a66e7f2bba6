"""What grammars are given of a schema."""

from typing import Any

import pytest
from loraserve.errors import InvalidRequestError
from loraserve.sampling.grammar import Grammar
from loraserve.validation.json_schema import forcible_schema

NOTE, KNOWN = {"type": "string", "format": "password"}, {"type": "string", "format": "uuid"}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda one: one,
        lambda one: {"properties": {"format": one}},
        lambda one: {"$defs": {"a": one}, "items": {"anyOf": [one]}},
        lambda one: {"prefixItems": [True, one], "additionalProperties": one},
    ],
)
def test_notes_are_left_out_and_formats_kept(wrap: Any) -> None:
    assert forcible_schema(wrap(NOTE)) == wrap({"type": "string"})
    assert forcible_schema(wrap(KNOWN)) == wrap(KNOWN)


def test_values_and_names_are_no_formats() -> None:
    schema = {"const": {"format": "x"}, "enum": [{"format": "x"}], "default": {"format": "x"}}
    assert forcible_schema(schema) == schema
    assert Grammar("json_schema", NOTE) == Grammar("json_schema", {"type": "string"})


@pytest.mark.parametrize(
    "schema",
    [
        {"maximum": 2**63},
        {"type": "integer", "exclusiveMinimum": -(2**63) - 1},
        {"type": "integer", "maximum": 1e30},
        {"const": 2**64},
        {"enum": [1, -(2**64)]},
    ],
)
def test_integers_beyond_64_bits_are_refused(schema: dict[str, Any]) -> None:
    for one in (schema, {"type": "object", "properties": {"a": schema}}):
        with pytest.raises(InvalidRequestError, match="64 bits"):
            Grammar("json_schema", one)


def test_those_within_and_numbers_are_not() -> None:
    for schema in (
        {"type": "integer", "maximum": 2**63 - 1},
        {"type": "number", "maximum": 1e300},
        {"const": 2**64 - 1},
    ):
        assert forcible_schema(schema) == schema
