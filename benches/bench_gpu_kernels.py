"""Times the CUDA kernels with Llama-3-8B's shapes: replays of captured graphs between CUDA events.

A graph holds a launch for each of several layers, whose weights and pages are read once; the L2 cache is
emptied before each replay. Bandwidths stand beside that of a large copy in the same run.

    python benches/bench_gpu_kernels.py [--json FILE] [--markdown FILE]
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_kernels import LLAMA_3_8B, Bench, Case
from loraserve import _core

NUM_REPLAYS = 30
FLUSH_NBYTES = 512 << 20  # more than any L2 cache
COPY_NBYTES = 2 << 30


@dataclasses.dataclass(frozen=True)
class Timing:
    op: str
    num_rows: int
    mix: str
    microseconds: float  # of one launch, the median over replays
    gb_per_s: float
    percent_of_copy: float
    tflop_per_s: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu_kernels: torch finds no NVIDIA GPU here; nothing was measured", file=sys.stderr)
        return 1
    copy_gb_per_s = copy_bandwidth()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        bench = Bench(LLAMA_3_8B, lambda tensor: tensor.cuda(), stream.cuda_stream)
        timings = [measure(case, LLAMA_3_8B.num_layers, copy_gb_per_s) for case in bench.cases()]
    text = report(timings, copy_gb_per_s)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        result = {"device": device(), "copy_gb_per_s": copy_gb_per_s}
        result["timings"] = [dataclasses.asdict(timing) for timing in timings]
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


def measure(case: Case, num_launches: int, copy_gb_per_s: float) -> Timing:
    run = case.begin(torch.cuda.current_stream().cuda_stream)
    run(torch.cuda.current_stream().cuda_stream)  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(torch.cuda.current_stream().cuda_stream)
    flush = torch.empty(FLUSH_NBYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(NUM_REPLAYS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        graph.replay()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    milliseconds = statistics.median(before.elapsed_time(after) for before, after in pairs)
    seconds = milliseconds / 1e3 / num_launches
    gb_per_s = case.nbytes / seconds / 1e9
    return Timing(
        op=case.op,
        num_rows=case.num_rows,
        mix=case.mix,
        microseconds=seconds * 1e6,
        gb_per_s=gb_per_s,
        percent_of_copy=100 * gb_per_s / copy_gb_per_s,
        tflop_per_s=case.flop / seconds / 1e12,
    )


def copy_bandwidth() -> float:
    """GB/s read and written by the best of several large copies."""
    source, target = (torch.empty(COPY_NBYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    best = float("inf")
    for _ in range(10):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        target.copy_(source)
        after.record()
        torch.cuda.synchronize()
        best = min(best, before.elapsed_time(after))
    return 2 * COPY_NBYTES / (best / 1e3) / 1e9


def device() -> str:
    facts, properties = _core.cuda_facts(), torch.cuda.get_device_properties(0)
    memory = f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB"
    software = f"driver for CUDA {facts['driver']}, NVRTC {facts['nvrtc']}, torch {torch.__version__}"
    return f"{properties.name}, {memory}, {software}"


def report(timings: Sequence[Timing], copy_gb_per_s: float) -> str:
    lines = [
        f"{device()}. A large copy moves {copy_gb_per_s:.0f} GB/s.",
        "",
        f"Time of one launch: the median of {NUM_REPLAYS} replays of {LLAMA_3_8B.num_layers} launches. GB/s",
        "counts what must move once. Weights and pages are not in the L2 cache; activations are, from the",
        "second launch on.",
        "",
        "| op | rows | | µs | GB/s | of a copy | TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for timing in timings:
        tflop = f"{timing.tflop_per_s:.1f}" if timing.tflop_per_s else ""
        lines.append(
            f"| {timing.op} | {timing.num_rows} | {timing.mix} | {timing.microseconds:.1f} "
            f"| {timing.gb_per_s:.0f} | {timing.percent_of_copy:.0f}% | {tflop} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
