"""Results of several machines and precisions become one table a machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import precision_tables


def document(precision: str, cpu: str, results: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    machine = {"cpu": cpu, "cores": 2}
    return {"machine": machine, "settings": {"precision": precision}, "results": results}


def result(distinct: int, alone: dict[str, float], **rates: list[float]) -> Mapping[str, Any]:
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    return {"distinct": distinct, "rates": rates, "medians": medians, "inter_token_ms": alone}


def test_each_machine_has_a_table_with_dense_weights_first() -> None:
    tables = precision_tables.speed(
        [
            document("int8", "A", [result(0, {"x": 1.04}, x=[1.0, 2.0, 3.0])]),
            document("bf16", "A", [result(0, {}, x=[4.0, 4.0]), result(32, {}, x=[5.0, 5.0])]),
            document("bf16", "B", [result(0, {}, y=[6.0, 6.0])]),
        ]
    )
    header, rows = tables["A, 2 cores"]
    assert header == ("weights", "engine", "base", "32 distinct", "one stream, ms a token")
    assert rows == [("bf16", "x", "4", "5", ""), ("int8", "x", "2", "", "1.0")]
    assert tables["B, 2 cores"][1] == [("bf16", "y", "6", "")]


def test_an_engine_that_was_left_out_has_an_empty_cell_and_a_single_turn_is_named() -> None:
    results = [result(0, {}, x=[1.0, 1.0], y=[7.0]), result(32, {}, x=[2.0, 2.0])]
    _, rows = precision_tables.speed([document("f32", "A", results)])["A, 2 cores"]
    assert rows == [("f32", "x", "1", "2", ""), ("f32", "y", "7 (1 turn)", "", "")]


def test_of_files_with_one_name_the_last_folder_counts(tmp_path: Path) -> None:
    for folder, names in (("published", "ab"), ("results", "b")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(f"{folder} {name}"))
    folders = (tmp_path / "published", tmp_path / "results")
    assert precision_tables.latest("*.json", folders) == ["published a", "results b"]
