"""Times the CUDA kernels with Llama-3-8B's shapes: replays of captured graphs between CUDA events.

A graph holds a launch for each of several layers, whose weights and pages are read once; the L2 cache is
emptied before each replay. Bandwidths stand beside that of a large copy in the same run.

    python benches/bench_gpu_kernels.py [--json FILE] [--once]
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_facts import copy_bandwidth, device
from gpu_kernels import LLAMA_3_8B, Bench, Case, Run

NUM_REPLAYS = 30
FLUSH_NBYTES = 512 << 20  # more than any L2 cache


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
    parser.add_argument("--once", action="store_true", help="run a few cases once, untimed, for a profiler")
    parser.add_argument(
        "--rehearse", action="store_true", help="a toy's shapes on the tests' emulator, untimed"
    )
    arguments = parser.parse_args()
    if arguments.rehearse:
        return rehearse()
    if not torch.cuda.is_available():
        print("bench_gpu_kernels: torch finds no NVIDIA GPU here; nothing was measured", file=sys.stderr)
        return 1
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        shapes = dataclasses.replace(LLAMA_3_8B, num_layers=1) if arguments.once else LLAMA_3_8B
        bench = Bench(shapes, lambda tensor: tensor.cuda(), stream.cuda_stream)
        if arguments.once:
            return run_once(bench)
        copy_gb_per_s = copy_bandwidth()
        print(HEAD.format(device=device(), copy=copy_gb_per_s, layers=LLAMA_3_8B.num_layers), flush=True)
        timings = []
        for case in bench.cases():
            timings.append(measure(case, LLAMA_3_8B.num_layers, copy_gb_per_s))
            print(row(timings[-1]), flush=True)
    if arguments.json:
        result = {"device": device(), "copy_gb_per_s": copy_gb_per_s}
        result["timings"] = [dataclasses.asdict(timing) for timing in timings]
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


def run_once(bench: Bench) -> int:
    """Each kind of kernel that is ours: one launch, as a profiler repeats and flushes by itself."""
    for case in bench.cases():
        if case.op.startswith(("lora", "attention")) and case.num_rows in (1, 64, LLAMA_3_8B.prompt_tokens):
            stream = torch.cuda.current_stream().cuda_stream
            print(case.op, case.num_rows, case.mix, flush=True)
            case.begin(stream)(stream)
            torch.cuda.synchronize()
    return 0


def rehearse() -> int:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.gpu.device import Gpu, open_driver  # noqa: PLC0415 (not there in a wheel)
    from tests.gpu.test_bench_cases import SMALL  # noqa: PLC0415

    driver, reason = open_driver()
    if driver is None or not driver.is_emulated:
        raise SystemExit(f"bench_gpu_kernels: no emulator to rehearse on: {reason}")
    gpu = Gpu(driver, torch.device("cpu"), driver.create_stream())
    for case in Bench(SMALL, gpu.place, gpu.stream).cases():
        case.begin(gpu.stream)(gpu.stream)
        gpu.synchronize()
        print(case.op, case.num_rows, case.mix, "ran")
    return 0


def measure(case: Case, num_launches: int, copy_gb_per_s: float) -> Timing:
    run = case.begin(torch.cuda.current_stream().cuda_stream)
    run(torch.cuda.current_stream().cuda_stream)  # compiles and loads
    torch.cuda.synchronize()
    replay = captured(run) if case.can_be_captured else lambda: run(torch.cuda.current_stream().cuda_stream)
    flush = torch.empty(FLUSH_NBYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(NUM_REPLAYS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        replay()
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


def captured(run: Run) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(torch.cuda.current_stream().cuda_stream)
    return graph.replay


HEAD = """{device}. A large copy moves {copy:.0f} GB/s.

Time of one launch: the median of replays of a graph of {layers} launches. GB/s counts what must move once.
Weights and pages are not in the L2 cache; activations are, from the second launch on. Sampling is launched
one after another, not replayed: its copies are in the time. torch's LoRA is bmm over stacked weights.

| op | rows | | µs | GB/s | of a copy | TFLOP/s |
|---|---|---|---|---|---|---|"""


def row(timing: Timing) -> str:
    tflop = f"{timing.tflop_per_s:.1f}" if timing.tflop_per_s else ""
    return (
        f"| {timing.op} | {timing.num_rows} | {timing.mix} | {timing.microseconds:.1f} "
        f"| {timing.gb_per_s:.0f} | {timing.percent_of_copy:.0f}% | {tflop} |"
    )


if __name__ == "__main__":
    sys.exit(main())
