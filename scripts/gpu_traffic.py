"""Counts what the LoRA kernels move for Llama-3-8B's projections, checks it, and prints a table.

    LORASERVE_TEST_CUDA_EMULATOR=<folder> LORASERVE_TEST_NVRTC=<folder> python scripts/gpu_traffic.py [rows …]

The kernels run on the emulator, which counts the 32-byte sectors that each warp's request touches. From these
follow lower bounds of the time on a GPU; nothing is timed. Blocks run one after another, so that a block that
waits for another looks once. Takes a minute or two; with rows (1, 8, 32, 64) only those cases run.
"""

import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

RANK = 16
SECTOR_NBYTES = 32
H100 = {"name": "H100", "bytes_per_us": 3.35e6, "num_sms": 132}
L4 = {"name": "L4", "bytes_per_us": 0.3e6, "num_sms": 58}
MAX_EXCESS = 1.10  # sectors to compulsory bytes
MIN_COALESCING = 0.95
MIN_BLOCKS_PER_SM = 2  # of an H100, at 32 rows of as many adapters
COLUMNS = (
    "rows",
    "adapters",
    "projection",
    "compulsory MB",
    "sectors ÷ compulsory",
    "coalescing",
    "blocks",
    "H100 µs",
    "L4 µs",
)
# Of the kernels' grids.
BLOCK_K = BLOCK_COLUMNS = 512


@dataclass(frozen=True)
class Projection:
    """A fused projection of Llama-3-8B."""

    name: str
    group: int
    in_features: int
    modules: tuple[int, ...]  # out_features

    @property
    def out_features(self) -> int:
        return sum(self.modules)

    @property
    def adapter_nbytes(self) -> int:
        """A of all modules, and their B."""
        return 2 * RANK * (len(self.modules) * self.in_features + self.out_features)


PROJECTIONS = (
    Projection("qkv", 0, 4096, (4096, 1024, 1024)),
    Projection("o", 1, 4096, (4096,)),
    Projection("gate_up", 2, 4096, (14336, 14336)),
    Projection("down", 3, 14336, (4096,)),
)
DECODE_MIXES = ((1, 1), (8, 1), (8, 8), (32, 1), (32, 8), (32, 32), (64, 1), (64, 8), (64, 64))
PREFILL_MIXES = ((150, 2),)


@dataclass(frozen=True)
class Case:
    """`num_rows` rows in equal segments of `num_adapters` adapters."""

    projection: Projection
    num_rows: int
    num_adapters: int
    is_decode: bool

    @property
    def compulsory_nbytes(self) -> int:
        """Each adapter once, x once, y read and written."""
        row_nbytes = 2 * (self.projection.in_features + 2 * self.projection.out_features)
        return self.num_adapters * self.projection.adapter_nbytes + self.num_rows * row_nbytes

    @property
    def num_blocks(self) -> int:
        """Blocks of the decode kernel that have work."""
        splits = -(-self.projection.in_features // BLOCK_K)
        chunks = -(-self.projection.out_features // BLOCK_COLUMNS)
        return self.num_adapters * (splits + chunks)


@dataclass(frozen=True)
class Traffic:
    """Counts of one launch, or of prefill's two."""

    sector_nbytes: int
    wasted_nbytes: int  # of sectors of instructions that ask for less than 4/5 of theirs
    bank_conflicts: int
    num_launches: int

    @property
    def coalescing(self) -> float:
        return 1 - self.wasted_nbytes / self.sector_nbytes


def main() -> int:
    wanted = {int(rows) for rows in sys.argv[1:]}
    mixes = [mix for mix in DECODE_MIXES if not wanted or mix[0] in wanted]
    cases = [Case(each, *mix, is_decode=True) for mix in mixes for each in PROJECTIONS]
    cases += [Case(each, *mix, is_decode=False) for mix in PREFILL_MIXES for each in PROJECTIONS]
    with (
        tempfile.TemporaryDirectory() as folder,
        # A case is a process, whose profile holds nothing else.
        multiprocessing.get_context("spawn").Pool(maxtasksperchild=1) as pool,
    ):
        profiles = [str(Path(folder) / f"{index}.json") for index in range(len(cases))]
        return check(mixes, pool.imap(measure, zip(cases, profiles, strict=True)))


def check(mixes: Sequence[tuple[int, int]], counted: Iterator[tuple[Case, Traffic]]) -> int:
    """Prints the table, of decode's cases and then of prefill's, and what is beyond the limits."""
    failures = []
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---:|---:|---|" + "---:|" * (len(COLUMNS) - 3))
    for num_rows, num_adapters in mixes:
        layer_nbytes = 0
        for case, traffic in islice(counted, len(PROJECTIONS)):
            layer_nbytes += traffic.sector_nbytes
            print(row_of(case, traffic), flush=True)
            failures += decode_failures(case, traffic)
        print(f"| {num_rows} | {num_adapters} | layer | | | | | {bounds(layer_nbytes)} |", flush=True)
    for case, traffic in counted:
        name = f"prefill {case.projection.name}"
        print(f"{name}, {case.num_rows} rows: {traffic.bank_conflicts} bank conflicts")
        if traffic.bank_conflicts > 0:
            failures.append(f"{name}: bank conflicts")
    print("\n".join(failures) or "all within limits")
    return 1 if failures else 0


def bounds(nbytes: int) -> str:
    return " | ".join(f"{nbytes / gpu['bytes_per_us']:.2f}" for gpu in (H100, L4))


def row_of(case: Case, traffic: Traffic) -> str:
    compulsory = case.compulsory_nbytes
    return (
        f"| {case.num_rows} | {case.num_adapters} | {case.projection.name} | {compulsory / 1e6:.2f} | "
        f"{traffic.sector_nbytes / compulsory:.3f} | {traffic.coalescing:.1%} | {case.num_blocks} | "
        f"{bounds(traffic.sector_nbytes)} |"
    )


def decode_failures(case: Case, traffic: Traffic) -> Iterator[str]:
    name = f"{case.projection.name}, {case.num_rows} rows of {case.num_adapters} adapters"
    excess = traffic.sector_nbytes / case.compulsory_nbytes
    if excess > MAX_EXCESS:
        yield f"{name}: sectors are {excess:.3f} of the compulsory bytes, limit is {MAX_EXCESS}"
    if traffic.coalescing < MIN_COALESCING:
        yield f"{name}: coalescing is {traffic.coalescing:.1%}, limit is {MIN_COALESCING:.0%}"
    if traffic.num_launches != 1:
        yield f"{name}: {traffic.num_launches} launches, limit is 1"
    if case.num_rows == case.num_adapters == 32 and case.num_blocks < MIN_BLOCKS_PER_SM * H100["num_sms"]:
        yield f"{name}: {case.num_blocks} blocks, at least {MIN_BLOCKS_PER_SM} per SM wanted"


def measure(case_and_profile: tuple[Case, str]) -> tuple[Case, Traffic]:
    case, profile = case_and_profile
    sys.modules["torch"] = None  # type: ignore[assignment]  # looked at for its folder, and seconds to import
    driver = load_driver(profile)
    run(case)
    driver.cuCtxSynchronize()
    driver.cuProfilerStop()
    with open(profile) as file:
        kernels = json.load(file)["kernels"]
    total = {
        key: sum(kernel[key] for kernel in kernels) for key in kernels[0] if isinstance(kernels[0][key], int)
    }
    spots = [spot for kernel in kernels for spot in kernel["hot_spots"]]
    return case, Traffic(
        sector_nbytes=SECTOR_NBYTES * (total["global_load_sectors"] + total["global_store_sectors"]),
        wasted_nbytes=sum(max(0, spot["sector_bytes"] - spot["requested_bytes"]) for spot in spots),
        bank_conflicts=total["shared_load_conflicts"] + total["shared_store_conflicts"],
        num_launches=total["launches"],
    )


def load_driver(profile: str) -> ctypes.CDLL:
    """The emulator, set to count, and NVRTC."""
    os.environ.update(CUEMU_PROFILE=profile, CUEMU_THREADS="1", CUEMU_HOST_OK="1")
    driver = ctypes.CDLL(
        str(Path(os.environ["LORASERVE_TEST_CUDA_EMULATOR"]) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL
    )
    for pattern in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):
        library = max(Path(os.environ["LORASERVE_TEST_NVRTC"]).glob(pattern))
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return driver


def run(case: Case) -> None:
    """The launches of one projection; all values are zero, which no count depends on."""
    from loraserve import _core  # noqa: PLC0415 (after the libraries it looks for)

    projection = case.projection
    page_nbytes = 2 * 8 * 16 * 128 * 2
    extent_pages = -(-(projection.adapter_nbytes + 4096) // page_nbytes)
    pool = aligned_zeros(case.num_adapters * extent_pages * page_nbytes)
    kernels = _core.CudaKernels(
        dtype="bfloat16",
        num_layers=1,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        pool_ptr=pool.ctypes.data,
        pool_nbytes=len(pool),
        groups=[(each.in_features, each.out_features) for each in PROJECTIONS],
        max_num_slots=case.num_adapters,
        max_num_tokens=256,
        max_num_seqs=64,
        max_group_rank=RANK * 3,
    )
    layout = adapter_layout(_core, projection)
    for slot in range(case.num_adapters):
        kernels.set_adapter(slot, slot * extent_pages, layout, 0)
    batch = batch_of(_core, case.num_rows, case.num_adapters, is_decode=case.is_decode)
    step = kernels.begin_step(batch, 0)
    x = aligned_zeros(2 * case.num_rows * projection.in_features)
    y = aligned_zeros(2 * case.num_rows * projection.out_features)
    kernels.lora(step, x.ctypes.data, y.ctypes.data, 0, projection.group, 0)


def aligned_zeros(nbytes: int) -> np.ndarray:
    raw = np.zeros(nbytes + 256, dtype=np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + nbytes]


def adapter_layout(core, projection: Projection):
    rank = RANK * len(projection.modules)
    end, out_offset, modules = 2 * rank * projection.in_features, 0, []
    for index, out_features in enumerate(projection.modules):
        modules.append((index * RANK, RANK, end, out_offset, out_features, 1.0))
        end, out_offset = end + 2 * RANK * out_features, out_offset + out_features
    place = (0, projection.group, 0, rank, projection.in_features, modules)
    return core.AdapterLayout.from_groups([place], 1, end + 1024)


def batch_of(core, num_rows: int, num_adapters: int, *, is_decode: bool = True):
    """Sequences of one token, or one prompt; row r has adapter r · adapters / rows."""
    num_seqs = num_rows if is_decode else 1
    bounds = np.arange(num_adapters + 1) * num_rows // max(num_adapters, 1)
    zeros = np.zeros(num_rows, dtype=np.int32)
    query_indptr = np.linspace(0, num_rows, num_seqs + 1).astype(np.int32)
    num_blocks = -(-num_rows // num_seqs // 16)
    arrays = dict(
        token_ids=zeros,
        positions=zeros,
        slot_mapping=zeros,
        query_indptr=query_indptr,
        context_lens=np.full(num_seqs, num_rows // num_seqs, dtype=np.int32),
        block_table=np.zeros(num_seqs * num_blocks, dtype=np.int32),
        block_table_indptr=np.arange(num_seqs + 1, dtype=np.int32) * num_blocks,
        logits_indices=query_indptr[1:] - 1,
        wave_indptr=np.asarray([0, num_adapters] if num_adapters else [0], dtype=np.int32),
        seg_start=bounds[:-1].astype(np.int32),
        seg_end=bounds[1:].astype(np.int32),
        seg_slot=np.arange(num_adapters, dtype=np.int32),
        seg_weight=np.ones(num_adapters, dtype=np.float32),
    )
    return core.Batch(arrays, 0 if is_decode else num_rows)


if __name__ == "__main__":
    sys.exit(main())
