"""The tables "Beside other engines, by precision", one a machine, from results of several machines.

A file is offline_<precision>_<machine>.json, quality_<machine>.json or sampled_<machine>.json, the machine as
`machine.slug` writes it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Sequence[str]


def latest(name: str, folders: Iterable[Path]) -> list[Mapping[str, Any]]:
    """What the files hold that match `name`, of equal names the one in the last folder, by name."""
    files = {file.name: file for folder in folders for file in sorted(folder.glob(name))}
    return [json.loads(files[key].read_text()) for key in sorted(files)]


def speed(documents: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Row, list[Row]]]:
    """Of each machine, header and rows: precision and engine, tok/s by adapters, one stream's ms a token."""
    tables = {}
    for machine in dict.fromkeys(map(title, documents)):
        own = [document for document in documents if title(document) == machine]
        counts = sorted({result["distinct"] for document in own for result in document["results"]})
        labels = [f"{count} distinct" if count else "base" for count in counts]
        header = ("weights", "engine", *labels, "one stream, ms a token")
        rows = [row for document in in_order(own) for row in speed_rows(document, counts)]
        tables[machine] = header, rows
    return tables


def speed_rows(document: Mapping[str, Any], counts: Sequence[int]) -> list[Row]:
    results = {result["distinct"]: result for result in document["results"]}
    engines = list(dict.fromkeys(name for result in results.values() for name in result["medians"]))
    rows = []
    for engine in engines:
        cells = [rate(results[count], engine) if count in results else "" for count in counts]
        alone = results.get(0, {}).get("inter_token_ms", {}).get(engine)
        cells.append("" if alone is None else f"{alone:.1f}")
        rows.append((document["settings"]["precision"], engine, *cells))
    return rows


def rate(result: Mapping[str, Any], engine: str) -> str:
    """The median, and of how many turns if it was one."""
    if engine not in result["medians"]:
        return ""
    turns = len(result["rates"][engine])
    return f"{result['medians'][engine]:.0f}" + (" (1 turn)" if turns == 1 else "")


def quality(documents: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Row, list[Row]]]:
    header = ("weights and engine", "mean KL", "99th percentile", "same likeliest token")
    return {
        title(document): (
            header,
            [
                (name, f"{d['kl']:.5f}", f"{d['kl_p99']:.4f}", f"{100 * d['top1']:.1f}%")
                for name, d in document["quality"].items()
            ],
        )
        for document in documents
    }


def sampled(documents: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Row, list[Row]]]:
    header = ("adapters", "greedy tok/s", "sampled tok/s", "sampled over greedy")
    return {
        title(document): (
            header,
            [
                (
                    f"{result['distinct']} distinct" if result["distinct"] else "base",
                    f"{result['medians']['greedy']:.0f}",
                    f"{result['medians']['sampled']:.0f}",
                    f"{result['over_greedy']:.3f}",
                )
                for result in document["results"]
            ],
        )
        for document in documents
    }


def title(document: Mapping[str, Any]) -> str:
    host = document["machine"]
    return f"{host['cpu']}, {host['cores']} cores"


def in_order(documents: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Dense weights first, the smallest last."""
    order = ["f32", "bf16", "int8", "int4", "int4-k"]
    return sorted(documents, key=lambda document: order.index(document["settings"]["precision"]))
