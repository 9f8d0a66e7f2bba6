"""Writes the tables of docs/performance.md from the results of `make bench`.

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`. A table whose result is missing is left
as it is, and named. With --publish the JSON files and plots go to docs/performance/ as well.

    python benches/tables.py --publish
"""

import argparse
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import precision_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benches/results"
DOCUMENT = ROOT / "docs/performance.md"
PUBLISHED = ROOT / "docs/performance"
CRITERION = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "criterion"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--publish", action="store_true", help="also copy results and plots to docs/")
    args = parser.parse_args()
    text = DOCUMENT.read_text()
    for name, table in TABLES.items():
        try:
            text = replace(text, name, written := table())
            if name in SHOWN:
                print(f"{name}\n{written}\n")
        except FileNotFoundError as error:
            print(f"table {name} is left as it is: no {error.filename}")
    DOCUMENT.write_text(text)
    if args.publish:
        PUBLISHED.mkdir(exist_ok=True)
        for file in sorted(RESULTS.glob("*")):
            if file.suffix in (".json", ".jsonl", ".png"):
                shutil.copy(file, PUBLISHED)


def replace(text: str, name: str, table: str) -> str:
    """`text` with the named table's content. Raises ValueError if it has no such table."""
    pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
    replaced, count = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the document has {count} tables named {name!r}, it must have one")
    return replaced


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def load(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def machine() -> str:
    document = load("latency.json")
    host, limits = document["machine"], document["limits"]
    return markdown(
        ("machine", ""),
        [
            ("CPU", f"{host['cpu']}, {host['cores']} cores"),
            ("memory", f"{host['memory_gib']} GiB"),
            ("streaming reads of 2 GiB", f"{limits['read_gb_per_s']:.1f} GB/s"),
            ("large bf16 products, own GEMM", f"{limits['own_gemm_gflop_per_s']:.0f} GFLOP/s"),
            ("large bf16 products, oneDNN", f"{limits['onednn_gemm_gflop_per_s']:.0f} GFLOP/s"),
            ("date", host["date"]),
        ],
    )


def offline() -> str:
    results = load("offline.json")["results"]
    engines = list(dict.fromkeys(name for result in results for name in result["medians"]))
    rows = []
    for result in results:
        cells = [f"{result['medians'][e]:.0f}" if e in result["medians"] else "" for e in engines]
        own = result["over_own_base"]
        best = min(result["over_peer"].values(), default=None)
        ratios = [f"{ratio:.2f}" if ratio is not None else "" for ratio in (own, best)]
        rows.append([f"{result['distinct']} distinct" if result["distinct"] else "base", *cells, *ratios])
    return markdown(("adapters", *engines, "over own base", "over best peer"), rows)


def by_machine(tables: dict[str, tuple[Sequence[str], list[Sequence[str]]]]) -> str:
    """A title and a table for each."""
    return "\n\n".join(f"{title}:\n\n{markdown(*table)}" for title, table in tables.items())


def precisions() -> str:
    return by_machine(precision_tables.speed(measured("offline_*_*-cores.json")))


def quality() -> str:
    return by_machine(precision_tables.quality(measured("quality_*-cores.json")))


def sampled() -> str:
    return by_machine(precision_tables.sampled(measured("sampled_*-cores.json")))


def measured(pattern: str) -> list[Any]:
    """Results of all machines: published ones, and this machine's in their place."""
    documents = precision_tables.latest(pattern, (PUBLISHED, RESULTS))
    if not documents:
        raise FileNotFoundError(errno.ENOENT, "no result", str(RESULTS / pattern))
    return documents


def latency() -> str:
    results = load("latency.json")["results"]
    one, decode, prefill = (results[key] for key in ("batch-1", "long decode", "long prefill"))
    start, first, beside = (results[key] for key in ("start", "adapter first token", "beside loads"))
    return markdown(
        ("", "measured", "of the limit"),
        [
            (
                "one stream",
                f"{one['inter_token_ms']:.2f} ms a token, {one['tokens_per_s']:.0f} tok/s",
                f"{one['share_of_read_limit']:.0%} of reads",
            ),
            (
                "8 streams at 4,096 tokens",
                f"{decode['inter_token_ms']:.1f} ms a token, {decode['tokens_per_s']:.0f} tok/s",
                f"{decode['share_of_read_limit']:.0%} of reads",
            ),
            (
                "prompt of 4,096 tokens",
                f"{prefill['ttft_ms']:.0f} ms, {prefill['gflop_per_s']:.0f} GFLOP/s",
                f"{prefill['share_of_gemm_peak']:.0%} of products",
            ),
            ("new process to engine ready", f"{start['ready_s']:.2f} s", ""),
            ("first token, adapter from disk", f"{first['over_resident_ms']:.1f} ms over a resident one", ""),
            ("others' p99 between tokens, 100 loads beside", f"{beside['p99_ratio']:.2f} x without", ""),
        ],
    )


def many() -> str:
    rows = [
        (
            result["memory"],
            str(result["num_resident"]),
            f"{result['loads_per_pass']:.0f}",
            f"{result['medians']['many']:.0f}",
            f"{result['medians']['few']:.0f}",
            f"{result['ratio']:.2f}",
        )
        for result in load("many.json")["results"]
    ]
    header = ("pool", "resident", "loads a pass", "tok/s on 1,000", "tok/s on 10", "ratio")
    return markdown(header, rows)


def streams() -> str:
    rows = []
    for name in ("slora", "zipf", "punica", "vtc"):
        for result in load(f"{name}.json")["results"]:
            cells = [
                f"{result[key][p]:.0f}"
                for key in ("ttft_ms", "inter_token_ms", "end_to_end_ms")
                for p in ("p50", "p99")
            ]
            rate, slo = f"{result['output_tokens_per_s']:.0f}", f"{result['slo_attainment']:.0%}"
            rows.append((name, result["stream"], *cells, rate, slo))
    latencies = [f"{what} {p}" for what in ("first token", "between", "end to end") for p in ("p50", "p99")]
    return markdown(("workload", "run", *latencies, "tok/s", "SLO"), rows)


def kernels() -> str:
    limits, *lines = (json.loads(line) for line in (RESULTS / "kernels.jsonl").read_text().splitlines())
    rows = [
        (
            line["kernel"],
            f"{line['seconds'] * 1e6:.0f}",
            f"{line['gb_per_s']:.1f} ({line['gb_per_s'] / limits['read_gb_per_s']:.0%})",
            f"{line['gflop_per_s']:.0f} ({line['gflop_per_s'] / limits['gemm_gflop_per_s']:.0%})",
        )
        for line in lines
    ]
    return markdown(("kernel", "us", "GB/s", "GFLOP/s"), rows)


def isas() -> str:
    """Shares of memory's rate at one row, and of the instruction set's own peak at 32 and 1,024."""
    _, *lines = (json.loads(line) for line in (RESULTS / "isas.jsonl").read_text().splitlines())
    rows = [
        (
            line["isa"],
            line["type"],
            f"{line['1']['gb_per_s']:.1f} ({line['1']['share']:.0%})",
            *(product_cell(line, num_rows) for num_rows in ("32", "1024")),
            "" if line["peak_gop_per_s"] is None else f"{line['peak_gop_per_s']:.0f}",
        )
        for line in sorted(lines, key=lambda line: isa_order(lines, line["isa"]))
    ]
    header = ("ISA", "weights", "1 row, GB/s", "32 rows, GOP/s", "1,024 rows, GOP/s", "peak, GOP/s")
    return markdown(header, rows)


def product_cell(line: dict[str, Any], num_rows: str) -> str:
    rate, share = line[num_rows]["gop_per_s"], line[num_rows]["share"]
    return f"{rate:.0f}" if share is None else f"{rate:.0f} ({share:.0%})"


def isa_order(lines: Sequence[dict[str, Any]], isa: str) -> int:
    return list(dict.fromkeys(line["isa"] for line in lines)).index(isa)


def scheduler() -> str:
    rows = []
    for work in ("decode", "mixed", "churn"):
        cells = []
        for registered in (100, 1_000, 10_000):
            folder = CRITERION / f"step of 256, {work}" / f"{registered} registered" / "new"
            estimates = json.loads((folder / "estimates.json").read_text())
            cells.append(f"{estimates['mean']['point_estimate'] / 1e3:.0f}")
        rows.append((work, *cells))
    header = ("us a step", "100 registered", "1,000 registered", "10,000 registered")
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "machine": machine,
    "offline": offline,
    "precisions": precisions,
    "quality": quality,
    "sampled": sampled,
    "latency": latency,
    "many": many,
    "streams": streams,
    "scheduler": scheduler,
    "kernels": kernels,
    "isas": isas,
}

SHOWN = ("precisions", "quality", "sampled")  # also printed

if __name__ == "__main__":
    main()
