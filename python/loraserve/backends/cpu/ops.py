"""The CPU backend: torch allocates, the Rust kernels compute, on one thread pool, without the GIL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraserve import _core
from loraserve.backends.cpu.program import CpuProgram, RankPart, record
from loraserve.errors import ModelError
from loraserve.models.ops import KvGeometry, Linear, ReadyRows

if TYPE_CHECKING:
    from loraserve.models.decoder import Decoder

BLOCK_SIZE = 16  # tokens per page: the lanes of the attention kernel
STORAGE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class CpuOps:
    """`Ops` over a pool of pages in main memory.

    Args:
        geometry: the model's KV cache; `block_size` is 16.
        dtype: storage dtype of weights, activations, KV and adapters: float32 or bfloat16.
        pool: uint8, 64-byte aligned, a multiple of the page size; kept alive here.
        num_threads: threads that compute, the caller's included; None means every core.
        isa: one of `Isa.ALL` in rust/kernels (amx … portable); None takes `LORASERVE_CPU_ISA`, else the
            best.
        part: of a rank, whose model it is.

    Inside a page, K blocks are stored [D / pack][16 tokens][pack] (pack is 2 for bfloat16, 1 for float32).
    """

    def __init__(
        self,
        geometry: KvGeometry,
        dtype: torch.dtype,
        pool: torch.Tensor,
        *,
        num_threads: int | None = None,
        isa: str | None = None,
        part: RankPart | None = None,
    ) -> None:
        if dtype not in STORAGE_DTYPES:
            raise ModelError(f"dtype is {dtype}, the CPU backend stores float32 or bfloat16")
        if geometry.block_size != BLOCK_SIZE:
            raise ModelError(f"block_size is {geometry.block_size}, the CPU backend needs {BLOCK_SIZE}")
        if pool.dtype != torch.uint8 or not pool.is_contiguous() or pool.device.type != "cpu":
            raise ModelError("the page pool must be a contiguous uint8 tensor in main memory")
        self._dtype = dtype
        self._pool = pool
        self._kernels = _core.CpuKernels(
            dtype=STORAGE_DTYPES[dtype],
            num_layers=geometry.num_layers,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            pool_ptr=pool.data_ptr(),
            pool_nbytes=pool.numel(),
            num_threads=num_threads,
            isa=isa,
            tokens=None if part is None else (part.first_token, part.has_last_tokens),
        )
        self._part = part
        self._attention_features = geometry.num_heads * geometry.head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._pool.device

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._kernels.isa

    @property
    def num_threads(self) -> int:
        """Threads that compute, the caller's included."""
        return self._kernels.num_threads

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> _core.PackedLinear:
        out_features, in_features = weight.shape
        weight = weight.detach().to(device="cpu", dtype=self._dtype).contiguous()
        bias = self._stored_bias(bias, out_features)
        bias_ptr = None if bias is None else bias.data_ptr()
        return self._kernels.pack(weight.data_ptr(), bias_ptr, in_features, out_features)

    def pack_quantized(
        self, parts: list[_core.QuantizedWeight], bias: torch.Tensor | None = None
    ) -> _core.PackedLinear:
        bias = self._stored_bias(bias, sum(part.out_features for part in parts))
        return self._kernels.pack_quantized(parts, None if bias is None else bias.data_ptr())

    def _stored_bias(self, bias: torch.Tensor | None, out_features: int) -> torch.Tensor | None:
        """Rounded to storage as the reference's is, added in float32."""
        if bias is None:
            return None
        if bias.shape != (out_features,):
            raise ModelError(f"bias has shape {tuple(bias.shape)}, the weight has {out_features} rows")
        return bias.detach().to(device="cpu", dtype=self._dtype).float().contiguous()

    def base_linears(self, decoder: Decoder) -> _core.CpuBaseLinears:
        """What adapters' gains and shifts are computed from."""
        return self._kernels.base_linears([_own_linear(linear) for linear in decoder.linears()])

    def set_adapter(self, slot: int, first_page: int, layout: _core.AdapterLayout) -> None:
        self._kernels.set_adapter(slot, first_page, layout)

    def move_extent(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        self._kernels.move_extent(slot, src_page, dst_page, num_pages)

    def begin_step(self, batch: _core.Batch) -> _core.CpuStep:
        return self._kernels.begin_step(batch)

    def record(self, decoder: Decoder) -> CpuProgram:
        """The model's forward pass as one call."""
        return record(self._kernels, decoder, self._dtype, self._attention_features, self._part)

    def sample(self, logits: torch.Tensor, arrays: _core.SampleArrays) -> ReadyRows:
        if logits.dtype != torch.float32 or not logits.is_contiguous() or not logits.is_cpu:
            raise ValueError(
                f"logits are {logits.dtype} on {logits.device}, expected contiguous float32 on cpu"
            )
        num_rows, num_columns = logits.shape
        return ReadyRows(self._kernels.sample(logits.data_ptr(), num_rows, num_columns, arrays))


def _own_linear(linear: Linear) -> _core.PackedLinear:
    assert isinstance(linear, _core.PackedLinear), "invariant: the decoder was packed by these ops"
    return linear
