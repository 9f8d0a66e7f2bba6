"""The tables that the `sql` task asks about, read from tables.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Category:
    """A text column; `phrase` narrows a noun to one value, as in "books by Woolf"."""

    column: str
    phrase: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """A number column and how English compares it."""

    column: str
    low: int
    high: int
    more: str
    less: str
    most: str
    least: str


@dataclass(frozen=True)
class Schema:
    """A table: what its rows are called, the column that names a row, and the other columns."""

    table: str
    singular: str
    label: str
    categories: tuple[Category, ...]
    measures: tuple[Measure, ...]

    @property
    def columns(self) -> list[str]:
        return [self.label, *(c.column for c in self.categories), *(m.column for m in self.measures)]


def _schema(fields: dict[str, Any]) -> Schema:
    categories = tuple(
        Category(**{**item, "values": tuple(item["values"])}) for item in fields.pop("categories")
    )
    measures = tuple(Measure(**item) for item in fields.pop("measures"))
    return Schema(**fields, categories=categories, measures=measures)


def load_schemas() -> tuple[Schema, ...]:
    return tuple(map(_schema, json.loads(Path(__file__).with_name("tables.json").read_text())))
