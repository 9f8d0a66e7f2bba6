"""Counts the blocks of LoRA kernels that a replayed decode step launches, checks them, and prints a table.

    LORASERVE_TEST_CUDA_EMULATOR=<folder> LORASERVE_TEST_NVRTC=<folder> python scripts/gpu_blocks.py

Llama-3-8B's projections, steps of up to 256 rows, one layer, through the product's own choice of graphs. The
emulator says how many blocks each launch had; those with work follow from the kernel's grid. Adapters have no
weights here, which no count depends on.
"""

import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gpu_traffic
import torch
from gpu_traffic import BLOCK_COLUMNS, BLOCK_K, PROJECTIONS, Projection

MAX_ROWS = 256
NUM_ROWS = (1, 8, 64, 256)
NUM_ADAPTERS = (0, 1, 8)  # and as many as rows
# Blocks launched, of those with work, beyond the smallest graphs.
MAX_EXCESS = 4
FEW_ITEMS = 8
# Of a layer's four projections.
BLOCKS_OF_ITEM = sum(
    -(-each.in_features // BLOCK_K) + -(-each.out_features // BLOCK_COLUMNS) for each in PROJECTIONS
)


def main() -> int:
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        failures = pool.apply(check_blocks, (Path(folder) / "profile.json",))
    print("\n".join(failures) or "all within limits")
    return 1 if failures else 0


def check_blocks(profile: Path) -> list[str]:
    """Prints the table and says what is beyond the limits."""
    counter = Counter(profile)
    replays = [Replay(counter, projection) for projection in PROJECTIONS]
    failures = []
    print("| rows | adapters | launches | blocks | with work |\n|---:|---:|---:|---:|---:|")
    for num_rows in NUM_ROWS:
        for num_adapters in sorted({*(n for n in NUM_ADAPTERS if n <= num_rows), num_rows}):
            counts = [replay(num_rows, num_adapters) for replay in replays]
            launches, blocks = (sum(column) for column in zip(*counts, strict=True))
            num_items = items_of(num_rows, num_adapters)
            work = num_items * BLOCKS_OF_ITEM
            print(f"| {num_rows} | {num_adapters} | {launches} | {blocks} | {work} |", flush=True)
            limit = min(max(MAX_EXCESS * num_items, FEW_ITEMS), num_rows) * BLOCKS_OF_ITEM
            limit = limit if num_items > 0 else 0
            if blocks > limit:
                failures.append(
                    f"{num_rows} rows of {num_adapters} adapters: {blocks} blocks, limit is {limit}"
                )
    return failures


def items_of(num_rows: int, num_adapters: int) -> int:
    """Pieces of up to 64 rows of one adapter."""
    return num_adapters * -(-num_rows // (64 * num_adapters)) if num_adapters > 0 else 0


class Counter:
    """Launches of `lora_decode`, by the emulator's profile."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self.driver = gpu_traffic.load_driver(str(profile))

    def __call__(self, run: Callable[[], object]) -> tuple[int, int]:
        """Launches that `run` makes, and the blocks of them: they are of one grid."""
        before, _ = self._read()
        run()
        launches, blocks = self._read()
        return launches - before, (launches - before) * blocks

    def _read(self) -> tuple[int, int]:
        self.driver.cuCtxSynchronize()
        self.driver.cuProfilerStop()
        kernels = json.loads(self._profile.read_text())["kernels"]
        found = [(each["launches"], each["grid"][0]) for each in kernels if each["name"] == "lora_decode"]
        return found[0] if found else (0, 0)


class Replay:
    """The graphs of one projection."""

    def __init__(self, counter: Counter, projection: Projection) -> None:
        from loraserve import _core  # noqa: PLC0415 (after the libraries it looks for)
        from loraserve.backends.cuda.graphs import DecodeGraphs  # noqa: PLC0415

        self._counter, self._core, self._projection = counter, _core, projection
        self._pool = gpu_traffic.aligned_zeros(1 << 20)
        self._kernels = _core.CudaKernels(
            dtype="bfloat16",
            num_layers=1,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            pool_ptr=self._pool.ctypes.data,
            pool_nbytes=len(self._pool),
            groups=[(each.in_features, each.out_features) for each in PROJECTIONS],
            max_num_slots=MAX_ROWS,
            max_num_tokens=MAX_ROWS,
            max_num_seqs=MAX_ROWS,
            max_group_rank=8,
        )
        nothing = _core.AdapterLayout.from_groups([], 1, 1024)
        for slot in range(MAX_ROWS):
            self._kernels.set_adapter(slot, 0, nothing, 0)
        self._x = gpu_traffic.aligned_zeros(2 * MAX_ROWS * projection.in_features)
        self._y = gpu_traffic.aligned_zeros(2 * MAX_ROWS * projection.out_features)
        self._graphs = DecodeGraphs(self, self, self._run, MAX_ROWS)  # type: ignore[arg-type]
        self._graphs.capture()

    def __call__(self, num_rows: int, num_adapters: int) -> tuple[int, int]:
        """Launches and blocks of a step whose rows are in equal segments of the adapters."""
        batch = gpu_traffic.batch_of(self._core, num_rows, num_adapters)
        bucket = self._graphs.bucket(batch)
        assert bucket is not None
        return self._counter(lambda: self._graphs.run(batch, bucket))

    def begin_padded_step(self, batch, num_tokens: int, num_items: int):
        num_items = num_items if batch.num_tokens > 0 else 0  # what precedes a capture need not be counted
        return self._kernels.begin_step(batch, 0, padded_tokens=num_tokens, padded_items=num_items)

    def graph_memory(self) -> None:
        """Nothing is shared."""

    def capture(self, run: Callable[[], torch.Tensor], memory: None) -> Callable[[], torch.Tensor]:
        """A graph repeats the launches of the step it was captured with, and so does this."""
        return run

    def _run(self, step) -> torch.Tensor:
        if step.has_adapters:
            x, y = self._x.ctypes.data, self._y.ctypes.data
            self._kernels.lora(step, x, y, 0, self._projection.group, 0)
        return torch.zeros(step.num_tokens, 1)


if __name__ == "__main__":
    sys.exit(main())
