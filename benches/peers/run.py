"""Other engines on the offline workload: 32 requests at once, 128 tokens in, 64 out, greedy.

Each peer is installed on first use into an environment of its own, with the versions pinned in
requirements/<peer>.txt, and gets the same weights, adapters (rank 16, all projections) and prompts.
Its driver, <peer>_driver.py, is a process that answers one JSON line with another; driver.py describes
the protocol, `PeerProcess` in process.py speaks it, so another bench can alternate peers with itself.

    python benches/peers/run.py openvino --distinct 0 1 8 32 --json peers.json
    python benches/peers/run.py openvino llamacpp vllm --repeats 5
    python benches/peers/run.py openvino llamacpp --precision int8

Prints output tokens per second (prompt time included) as min / median / max; for 0 distinct adapters also
the time between tokens of one request alone.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import gguf_models
from checkpoint import NUM_ADAPTERS, prepare
from environments import DEFAULT_VENVS, PEERS, Peer, ensure_environment
from loraserve.errors import LoraserveError
from precisions import PRECISIONS
from process import PeerJob, PeerProcess

RANK = 16


def main() -> None:
    args = parse_args()
    load_before = os.getloadavg()
    args.venvs.mkdir(parents=True, exist_ok=True)
    try:
        pythons = {name: ensure_environment(PEERS[name], args.venvs) for name in args.peers}
        data = prepare(args.venvs / "data", RANK)
        if any(PEERS[name].reads_gguf for name in args.peers):
            gguf_models.ensure(data, PRECISIONS[args.precision].gguf, args.venvs)
        if PRECISIONS[args.precision].is_quantized and any(PEERS[name].is_dense_only for name in args.peers):
            raise RuntimeError(f"some driver of {', '.join(args.peers)} has no quantised weights")
        results = [
            measure(PEERS[name], pythons[name], data, distinct, args)
            for distinct in args.distinct
            for name in args.peers
        ]
    except (RuntimeError, LoraserveError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        document = {
            "precision": args.precision,
            "threads": args.threads,
            "load_before": load_before,
            "results": results,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


def measure(peer: Peer, python: Path, data: Path, distinct: int, args: argparse.Namespace) -> dict[str, Any]:
    print(f"{peer.name}, {distinct} distinct: starting", file=sys.stderr)
    job = PeerJob(distinct, args.threads, PRECISIONS[args.precision])
    with PeerProcess(peer, python, data, job) as process:
        batches = [process.run("batch") for _ in range(args.repeats)]
        streams = [process.run("stream") for _ in range(args.repeats)] if distinct == 0 else []
        hello = process.hello
    rates = [batch["output_tokens_per_s"] for batch in batches]
    low, middle, high = min(rates), statistics.median(rates), max(rates)
    line = f"{hello['engine']:28} {distinct:3} distinct  {low:7.1f} {middle:7.1f} {high:7.1f} tok/s"
    if streams:
        line += f"  alone {statistics.median(stream['inter_token_ms'] for stream in streams):.1f} ms a token"
    print(f"{line}  ready in {hello['ready_s']:.1f} s")
    return {"peer": peer.name, "distinct": distinct, **hello, "batches": batches, "streams": streams}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="+", choices=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument(
        "--distinct",
        type=int,
        nargs="+",
        default=[0, 1, 8, 32],
        choices=range(NUM_ADAPTERS + 1),
        metavar="N",
        help=f"adapters the requests take turns on, 0 (base model) to {NUM_ADAPTERS}; default 0 1 8 32",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="bf16", help="of the weights; default bf16"
    )
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of each engine; default: one a core"
    )
    parser.add_argument(
        "--venvs",
        type=resolved_path,
        default=DEFAULT_VENVS.expanduser(),
        help=f"where environments and model files are kept; default {DEFAULT_VENVS}",
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def resolved_path(text: str) -> Path:
    return Path(text).expanduser().resolve()


if __name__ == "__main__":
    main()
