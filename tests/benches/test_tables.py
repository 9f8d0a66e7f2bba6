"""Tables go between their markers, and nowhere else."""

import pytest
import tables

DOCUMENT = (
    "before\n<!-- table: a -->\nold\nlines\n<!-- end -->\nmiddle\n<!-- table: b -->\n<!-- end -->\nafter\n"
)


def test_a_table_replaces_what_stands_between_its_markers() -> None:
    text = tables.replace(DOCUMENT, "a", r"new \1")
    assert text == DOCUMENT.replace("old\nlines", r"new \1")
    assert tables.replace(text, "a", r"new \1") == text


def test_a_table_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="0 tables named 'c'"):
        tables.replace(DOCUMENT, "c", "new")


def test_markdown_has_a_rule_under_its_header() -> None:
    assert tables.markdown(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_the_document_has_a_place_for_every_table() -> None:
    text = tables.DOCUMENT.read_text()
    for name in tables.TABLES:
        assert tables.replace(text, name, "here").count("here") > text.count("here")
