"""Launches of the CUDA kernels with the shapes of a model, and the bytes and products of each."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from loraserve import _core
from loraserve.models.ops import DOWN, GATE_UP, NUM_GROUPS, QKV, KvGeometry, O

BLOCK_SIZE = 16
ITEM_NBYTES = 2
OVERREAD = 1024  # bytes at the end of an adapter's extent
ALIGN = 64
GROUP_NAMES = {QKV: "qkv", O: "o", GATE_UP: "gate_up", DOWN: "down"}
Run = Callable[[int], None]  # queues every layer's launch on a stream


@dataclass(frozen=True)
class Shapes:
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rank: int
    num_layers: int  # launches of one measurement, each with weights and pages of its own
    context_len: int
    batch_sizes: Sequence[int]
    prompt_tokens: int
    vocab_size: int

    @property
    def geometry(self) -> KvGeometry:
        return KvGeometry(self.num_layers, self.num_heads, self.num_kv_heads, self.head_dim)

    def modules(self, group: int) -> tuple[int, tuple[int, ...]]:
        """(in_features, out_features of each module) of a fused projection."""
        kv = self.num_kv_heads * self.head_dim
        return (
            (self.hidden, (self.num_heads * self.head_dim, kv, kv)),
            (self.num_heads * self.head_dim, (self.hidden,)),
            (self.hidden, (self.intermediate, self.intermediate)),
            (self.intermediate, (self.hidden,)),
        )[group]

    def lora_nbytes(self, group: int) -> int:
        """A and B of one adapter and layer."""
        in_features, out_features = self.modules(group)
        return self.rank * (in_features * len(out_features) + sum(out_features)) * ITEM_NBYTES


LLAMA_3_8B = Shapes(
    hidden=4096,
    intermediate=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rank=16,
    num_layers=8,
    context_len=2048,
    batch_sizes=(1, 8, 32, 64),
    prompt_tokens=2048,
    vocab_size=128256,
)


@dataclass(frozen=True)
class Case:
    """`begin` prepares a step and returns what runs it; bytes and FLOP are those of one launch.

    What copies to the device or from it can't be captured.
    """

    op: str
    num_rows: int
    mix: str
    nbytes: int
    flop: int
    begin: Callable[[int], Run]
    can_be_captured: bool = True


@dataclass(frozen=True)
class Arrays:
    """A step's arrays, before they are a `_core.Batch`."""

    token_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int32]
    query_indptr: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_table: npt.NDArray[np.int32]
    block_table_indptr: npt.NDArray[np.int32]
    logits_indices: npt.NDArray[np.int32]
    wave_indptr: npt.NDArray[np.int32]
    seg_start: npt.NDArray[np.int32]
    seg_end: npt.NDArray[np.int32]
    seg_slot: npt.NDArray[np.int32]
    seg_weight: npt.NDArray[np.float32]

    def build(self) -> _core.Batch:
        arrays: Any = vars(self)
        num_queries = np.diff(self.query_indptr)
        return _core.Batch(arrays, int(num_queries[num_queries > 1].sum()))


def arrays_of(sequences: Sequence[tuple[int, int]], segments: Sequence[tuple[int, int, int]] = ()) -> Arrays:
    """Sequences (queries, context length) on pages of their own; segments (first row, end, slot)."""
    starts = np.cumsum([0, *(-(-context // BLOCK_SIZE) for _, context in sequences)])
    positions = [np.arange(context - queries, context) for queries, context in sequences]
    slots = [start * BLOCK_SIZE + own for start, own in zip(starts, positions, strict=False)]
    query_indptr = np.cumsum([0, *(queries for queries, _ in sequences)])
    columns = list(zip(*segments, strict=True)) or [(), (), ()]

    def int32(values: object) -> npt.NDArray[np.int32]:
        return np.asarray(values, dtype=np.int32)

    return Arrays(
        token_ids=np.zeros(query_indptr[-1], dtype=np.int32),
        positions=int32(np.concatenate(positions)),
        slot_mapping=int32(np.concatenate(slots)),
        query_indptr=int32(query_indptr),
        context_lens=int32([context for _, context in sequences]),
        block_table=int32(np.arange(starts[-1])),
        block_table_indptr=int32(starts),
        logits_indices=int32(query_indptr[1:] - 1),
        wave_indptr=int32([0, len(segments)] if segments else [0]),
        seg_start=int32(columns[0]),
        seg_end=int32(columns[1]),
        seg_slot=int32(columns[2]),
        seg_weight=np.ones(len(segments), dtype=np.float32),
    )


class Bench:
    """The kernels over a pool with random pages and adapters; `place` moves a tensor to the device."""

    def __init__(self, shapes: Shapes, place: Callable[[torch.Tensor], torch.Tensor], stream: int) -> None:
        self._shapes = shapes
        self._place = place
        geometry, num_adapters = shapes.geometry, max(shapes.batch_sizes)
        layout = adapter_layout(shapes)
        page_nbytes = geometry.page_nbytes(torch.bfloat16)
        extent_pages = -(-layout.nbytes // page_nbytes)
        context_pages = num_adapters * -(-shapes.context_len // BLOCK_SIZE)
        num_kv_pages = max(context_pages, shapes.prompt_tokens)  # prompts may end in any part of a page
        num_pages = num_kv_pages + num_adapters * extent_pages
        self._pool = place(_random_pages(num_pages, page_nbytes))
        self._kernels = _core.CudaKernels(
            dtype="bfloat16",
            num_layers=geometry.num_layers,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            pool_ptr=self._pool.data_ptr(),
            pool_nbytes=num_pages * page_nbytes,
            groups=[(i, sum(o)) for i, o in map(shapes.modules, range(NUM_GROUPS))],
            max_num_slots=num_adapters,
            max_num_tokens=max(shapes.prompt_tokens, num_adapters),
            max_num_seqs=num_adapters,
            max_group_rank=3 * shapes.rank,
            max_model_len=max(shapes.context_len, shapes.prompt_tokens),
        )
        for slot in range(num_adapters):
            self._kernels.set_adapter(slot, num_kv_pages + slot * extent_pages, layout, stream)
        num_rows = max(shapes.prompt_tokens, num_adapters)
        width = max(2 * shapes.intermediate, geometry.qkv_features)
        self._x, self._y = (place(torch.randn(num_rows * width).bfloat16()) for _ in range(2))
        self._weight = place(torch.randn(shapes.hidden).bfloat16())
        self._logits = place(5 * torch.randn(num_adapters, shapes.vocab_size))
        self._cos_sin = place(torch.rand(max(shapes.context_len, shapes.prompt_tokens), geometry.head_dim))

    def cases(self) -> Iterator[Case]:
        for num_rows in self._shapes.batch_sizes:
            for group in range(NUM_GROUPS):
                for mix in ("distinct", "identical"):
                    yield self._lora_decode(group, num_rows, mix)
                    yield self._torch_lora(group, num_rows, mix)
            yield from self._rows(num_rows)
            yield self._rope(num_rows)
            yield self._attention(num_rows)
            for mix, sampling in SAMPLINGS.items():
                yield self._sample(num_rows, mix, sampling)
        for num_adapters in (1, 8):
            for group in range(NUM_GROUPS):
                yield self._lora_prefill(group, num_adapters)

    def _lora_decode(self, group: int, num_rows: int, mix: str) -> Case:
        slots = range(num_rows) if mix == "distinct" else [0] * num_rows
        segments = [(row, row + 1, slot) for row, slot in enumerate(slots)]
        if mix == "identical":
            segments = [(0, num_rows, 0)]
        in_features, out_features = self._shapes.modules(group)
        rows_nbytes = num_rows * (in_features + 2 * sum(out_features)) * ITEM_NBYTES
        nbytes = len(set(slots)) * self._shapes.lora_nbytes(group) + rows_nbytes
        arrays = arrays_of([(1, BLOCK_SIZE)] * num_rows, segments)
        return self._lora(f"lora {GROUP_NAMES[group]}", group, arrays, mix, nbytes)

    def _torch_lora(self, group: int, num_rows: int, mix: str) -> Case:
        """The same sums by torch's batched products over stacked weights, as a plain server would do them."""
        in_features, out_features = self._shapes.modules(group)
        num_adapters = num_rows if mix == "distinct" else 1
        rows, rank = num_rows // num_adapters, self._shapes.rank
        ours = self._lora_decode(group, num_rows, mix)

        def begin(_: int) -> Run:
            def stacked(*shape: int) -> torch.Tensor:
                shape = (self._shapes.num_layers, num_adapters, *shape)
                return self._place((torch.randn(1, 1, *shape[2:]) / 16).bfloat16().expand(shape).contiguous())

            a = stacked(in_features, rank * len(out_features))
            b = [stacked(rank, width) for width in out_features]
            x = self._x[: num_rows * in_features].view(num_adapters, rows, in_features)
            y = self._y[: num_rows * sum(out_features)].view(num_adapters, rows, sum(out_features))

            def run(_: int) -> None:
                for layer in range(self._shapes.num_layers):
                    shrunk = torch.bmm(x, a[layer]).split(rank, dim=2)
                    for part, s, expand in zip(y.split(out_features, dim=2), shrunk, b, strict=True):
                        part.baddbmm_(s, expand[layer])

            return run

        return dataclasses.replace(ours, op=f"torch {GROUP_NAMES[group]}", begin=begin)

    def _lora_prefill(self, group: int, num_adapters: int) -> Case:
        num_tokens = self._shapes.prompt_tokens // num_adapters
        ends = [num_tokens * (slot + 1) for slot in range(num_adapters)]
        segments = [(end - num_tokens, end, slot) for slot, end in enumerate(ends)]
        in_features, out_features = self._shapes.modules(group)
        rows_nbytes = ends[-1] * (in_features + 2 * sum(out_features)) * ITEM_NBYTES
        nbytes = num_adapters * self._shapes.lora_nbytes(group) + rows_nbytes
        arrays = arrays_of([(num_tokens, num_tokens)] * num_adapters, segments)
        mix = f"prefill, {num_adapters} adapters"
        return self._lora(f"lora {GROUP_NAMES[group]}", group, arrays, mix, nbytes)

    def _lora(self, op: str, group: int, arrays: Arrays, mix: str, nbytes: int) -> Case:
        num_rows = len(arrays.positions)

        def launch(step: _core.CudaStep, layer: int, stream: int) -> None:
            self._kernels.lora(step, self._x.data_ptr(), self._y.data_ptr(), layer, group, stream)

        flop = num_rows * self._shapes.lora_nbytes(group) // ITEM_NBYTES * 2
        return Case(op, num_rows, mix, nbytes, flop, self._stepping(arrays, launch))

    def _rows(self, num_rows: int) -> Iterator[Case]:
        hidden, intermediate = self._shapes.hidden, self._shapes.intermediate
        x, y = self._x.data_ptr(), self._y.data_ptr()

        def norm(_: int, stream: int) -> None:
            pointers = x, y, self._weight.data_ptr(), x
            self._kernels.rms_norm(*pointers, num_rows, hidden, 1e-5, stream)

        def silu(_: int, stream: int) -> None:
            self._kernels.silu_mul(x, y, num_rows, intermediate, stream)

        norm_nbytes = (4 * num_rows + 1) * hidden * ITEM_NBYTES
        silu_nbytes = 3 * num_rows * intermediate * ITEM_NBYTES
        yield Case("add_rms_norm", num_rows, "", norm_nbytes, 0, self._looping(norm))
        yield Case("silu_mul", num_rows, "", silu_nbytes, 0, self._looping(silu))

    def _rope(self, num_rows: int) -> Case:
        geometry = self._shapes.geometry
        values = geometry.qkv_features + (geometry.num_heads + 3 * geometry.num_kv_heads) * geometry.head_dim

        def launch(step: _core.CudaStep, layer: int, stream: int) -> None:
            pointers = self._x.data_ptr(), layer, self._cos_sin.data_ptr(), len(self._cos_sin)
            self._kernels.rope_and_cache(step, *pointers, None, None, 1e-5, stream)

        nbytes = num_rows * values * ITEM_NBYTES
        return Case("rope_and_cache", num_rows, "", nbytes, 0, self._stepping(self._decode(num_rows), launch))

    def _attention(self, num_rows: int) -> Case:
        geometry, context_len = self._shapes.geometry, self._shapes.context_len
        kv = 2 * context_len * geometry.num_kv_heads
        nbytes = num_rows * (kv + 2 * geometry.num_heads) * geometry.head_dim * ITEM_NBYTES

        def launch(step: _core.CudaStep, layer: int, stream: int) -> None:
            self._kernels.attention(step, self._x.data_ptr(), layer, self._y.data_ptr(), stream)

        flop = 4 * num_rows * context_len * geometry.num_heads * geometry.head_dim
        begin = self._stepping(self._decode(num_rows), launch)
        return Case("attention", num_rows, f"context {context_len}", nbytes, flop, begin)

    def _sample(self, num_rows: int, mix: str, sampling: dict[str, Any]) -> Case:
        """Copies included: parameters to the device, tokens and logprobs back."""
        arrays = sample_arrays(num_rows, self._shapes.vocab_size, sampling)
        pending: list[_core.PendingSamples] = []  # dropped before it has arrived, one would be waited for

        def launch(layer: int, stream: int) -> None:
            if layer == 0:
                pending.clear()
            pending.append(self._kernels.sample(self._logits.data_ptr(), arrays, stream))

        nbytes = num_rows * self._shapes.vocab_size * 4
        return Case("sample", num_rows, mix, nbytes, 0, self._looping(launch), can_be_captured=False)

    def _decode(self, num_rows: int) -> Arrays:
        return arrays_of([(1, self._shapes.context_len)] * num_rows)

    def _stepping(
        self, arrays: Arrays, launch: Callable[[_core.CudaStep, int, int], None]
    ) -> Callable[[int], Run]:
        def begin(stream: int) -> Run:
            step = self._kernels.begin_step(arrays.build(), stream)

            def run(stream: int) -> None:
                for layer in range(self._shapes.num_layers):
                    launch(step, layer, stream)

            return run

        return begin

    def _looping(self, launch: Callable[[int, int], None]) -> Callable[[int], Run]:
        def run(stream: int) -> None:
            for layer in range(self._shapes.num_layers):
                launch(layer, stream)

        return lambda _: run


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.95},
    "penalties, logprobs": {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "num_logprobs": 5},
}
NUM_PENALISED = 512  # tokens of a row with penalties


def sample_arrays(num_rows: int, vocab_size: int, sampling: dict[str, Any]) -> _core.SampleArrays:
    """Rows that are all sampled in one way, each with random bits and lists of its own."""
    num_listed = min(NUM_PENALISED, vocab_size) if "repetition_penalty" in sampling else 0
    plain: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "num_logprobs": None,
        "mask": None,
        "biased": (0, 0),
        "banned": (0, 0),
    }
    rng = np.random.default_rng(0)
    rows = []
    for row in range(num_rows):
        part = row * num_listed, (row + 1) * num_listed
        bits = int(rng.integers(0, 2**64, dtype=np.uint64))
        rows.append(plain | {"bits": bits, "seen": part, "counted": part} | sampling)
    ids = [token for _ in rows for token in rng.permutation(vocab_size)[:num_listed].tolist()]
    lists: dict[str, Any] = {"seen_ids": ids, "counted_ids": ids, "counts": [1.0] * len(ids)}
    return _core.SampleArrays(vocab_size, rows, **lists)


def adapter_layout(shapes: Shapes) -> _core.AdapterLayout:
    """An adapter of every module of every layer; what its bytes are does not matter here."""
    end, places = 0, []

    def block(rows: int, columns: int) -> int:
        nonlocal end
        start = end
        end = -(-(start + rows * columns * ITEM_NBYTES) // ALIGN) * ALIGN
        return start

    for layer in range(shapes.num_layers):
        for group in range(NUM_GROUPS):
            in_features, out_features = shapes.modules(group)
            rank, entries, column = shapes.rank * len(out_features), [], 0
            a_offset = block(rank, in_features)
            for index, width in enumerate(out_features):
                entries.append(
                    (index * shapes.rank, shapes.rank, block(width, shapes.rank), column, width, 1.0)
                )
                column += width
            places.append((layer, group, a_offset, rank, in_features, entries))
    return _core.AdapterLayout.from_groups(places, shapes.num_layers, end + OVERREAD)


def _random_pages(num_pages: int, page_nbytes: int) -> torch.Tensor:
    """Small random values, one page over and over: only their number matters."""
    page = (torch.randn(page_nbytes // ITEM_NBYTES) / 16).bfloat16()
    return page.view(torch.uint8).repeat(num_pages)
