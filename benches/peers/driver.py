"""What every peer's driver shares: its arguments, the workload it reads, and the line protocol.

A driver is one long-lived process inside the peer's own environment, serving one popularity. On standard
output it prints one JSON object a line, first `{"engine", "settings", "ready_s"}`; then, for each line on
standard input,

    {"run": "batch"}    {"output_tokens_per_s": ..., "seconds": ...}    all requests at once
    {"run": "stream"}   {"inter_token_ms": ..., "first_token_ms": ...}  one request alone, base model

and it ends when standard input does. Everything else an engine prints goes to standard error.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from precisions import PRECISIONS, Precision

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Job:
    """What to serve: the files of `checkpoint.prepare`, and how many adapters the requests take turns on."""

    data: Path
    work: Path
    distinct: int
    threads: int
    precision: Precision

    @property
    def gguf(self) -> Path:
        """The base model as `gguf_models.ensure` left it."""
        return self.data / f"gguf/model-{self.precision.gguf}.gguf"

    def adapter_of(self, request: int) -> int | None:
        return request % self.distinct if self.distinct else None


@dataclass(frozen=True)
class Workload:
    prompts: list[list[int]]
    new_tokens: int


class Peer(Protocol):
    engine: str
    settings: dict[str, object]

    def batch(self, prompts: list[list[int]], new_tokens: int) -> list[int]:
        """Answer all prompts at once, greedily; returns each answer's number of tokens."""
        ...

    def stream(self, prompt: list[int], new_tokens: int) -> list[float]:
        """Answer one prompt on the base model; returns the time at which each token came."""
        ...

    def close(self) -> None: ...


def serve(start: Callable[[Job], Peer], prepare: Callable[[Job], None] | None = None) -> None:
    """Write the peer's files, start the engine, warm it up, then answer the lines of standard input."""
    job = parse_args()
    replies = _take_stdout()
    if prepare is not None:
        prepare(job)
    fields = json.loads((job.data / "workload.json").read_text())
    workload = Workload(fields["prompts"], fields["new_tokens"])
    began = time.perf_counter()
    peer = start(job)
    try:
        ready = time.perf_counter() - began
        _reply(replies, {"engine": peer.engine, "settings": peer.settings, "ready_s": ready})
        peer.batch(workload.prompts, WARM_UP_TOKENS)
        for line in sys.stdin:
            _reply(replies, answer(peer, workload, json.loads(line)["run"]))
    finally:
        peer.close()


def answer(peer: Peer, workload: Workload, run: str) -> dict[str, float]:
    if run == "batch":
        return run_batch(peer, workload)
    if run == "stream":
        return run_stream(peer, workload)
    raise ValueError(f"run is {run!r}, known are 'batch' and 'stream'")


def run_batch(peer: Peer, workload: Workload) -> dict[str, float]:
    began = time.perf_counter()
    counts = peer.batch(workload.prompts, workload.new_tokens)
    seconds = time.perf_counter() - began
    if counts != [workload.new_tokens] * len(workload.prompts):
        raise RuntimeError(f"asked for {workload.new_tokens} tokens a request, got {counts}")
    return {"output_tokens_per_s": sum(counts) / seconds, "seconds": seconds}


def run_stream(peer: Peer, workload: Workload) -> dict[str, float]:
    began = time.perf_counter()
    times = peer.stream(workload.prompts[0], workload.new_tokens)
    if len(times) != workload.new_tokens:
        raise RuntimeError(f"asked for a stream of {workload.new_tokens} tokens, got {len(times)}")
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return {"inter_token_ms": statistics.median(gaps) * 1e3, "first_token_ms": (times[0] - began) * 1e3}


def parse_args() -> Job:
    parser = argparse.ArgumentParser(description="see run.py, which starts the drivers")
    parser.add_argument("--data", type=Path, required=True, help="folder written by checkpoint.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for the peer's own model files")
    parser.add_argument("--distinct", type=int, required=True, help="adapters in the batch, 0 for none")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, required=True)
    args = parser.parse_args()
    return Job(args.data, args.work, args.distinct, args.threads, PRECISIONS[args.precision])


def _take_stdout() -> TextIO:
    """Keep standard output for replies; what engines print to it, also from C++, goes to standard error."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, fields: dict[str, object] | dict[str, float]) -> None:
    print(json.dumps(fields), file=replies, flush=True)
