"""The CUDA backend: torch owns memory and dense products, our kernels do the rest on torch's stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.models.ops import KvGeometry, Linear, StepHandle
from loraserve.models.quantized import dequantize

if TYPE_CHECKING:
    from loraserve.backends.cuda.device import CudaDevice

STORAGE_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class DenseLinear:
    """A weight [out, in] in the storage dtype, as cuBLAS takes it."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class CudaLimits:
    """What the kernels' buffers are sized for; a captured graph works in them whatever a step holds."""

    max_num_slots: int
    max_num_tokens: int
    max_num_seqs: int
    max_lora_rank: int
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True)
class CudaStep:
    """A step whose arrays lie at fixed places on the device."""

    core: _core.CudaStep
    token_ids: torch.Tensor
    logits_indices: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.core.num_tokens

    @property
    def num_logits(self) -> int:
        return self.core.num_logits


class CudaPacker:
    """Weights as they are, in the storage dtype on the device."""

    def __init__(self, dtype: torch.dtype, device: CudaDevice) -> None:
        self._dtype = dtype
        self._device = device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device.device

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> DenseLinear:
        return DenseLinear(self._stored(weight), None if bias is None else self._stored(bias))

    def pack_quantized(
        self, parts: list[_core.QuantizedWeight], bias: torch.Tensor | None = None
    ) -> DenseLinear:
        return self.pack(torch.cat([dequantize(part) for part in parts]), bias)

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device=self.device, dtype=self._dtype).contiguous()


class CudaOps(CudaPacker):
    """`EagerOps` over a pool of pages in device memory.

    Args:
        geometry: the model's KV cache; `block_size` is 16.
        dtype: storage dtype of weights, activations, KV and adapters: bfloat16 or float16.
        pool: uint8 on the device, a multiple of the page size; kept alive here.
        groups: (in_features, out_features) of qkv, o, gate_up and down.
        limits: sizes of the kernels' buffers.
        device: where all this runs.

    Inside a page, K and V blocks are both stored [16 tokens][D].

    Raises:
        DeviceError: the device can't run the kernels; the message says what to do.
        CapacityError: the kernels' buffers don't fit beside the pool.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        dtype: torch.dtype,
        pool: torch.Tensor,
        *,
        groups: Sequence[tuple[int, int]],
        limits: CudaLimits,
        device: CudaDevice,
    ) -> None:
        if dtype not in STORAGE_DTYPES:
            raise ModelError(f"dtype is {dtype}, the CUDA backend stores bfloat16 or float16")
        super().__init__(dtype, device)
        self._pool = pool
        # Of every step: captured graphs would keep one each.
        self._logits = torch.empty(
            limits.max_num_seqs, limits.vocab_size, dtype=torch.float32, device=device.device
        )
        self._qkv_features = geometry.qkv_features
        self._attention_features = geometry.num_heads * geometry.head_dim
        self._kernels = _core.CudaKernels(
            dtype=STORAGE_DTYPES[dtype],
            num_layers=geometry.num_layers,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            pool_ptr=pool.data_ptr(),
            pool_nbytes=pool.numel(),
            groups=list(groups),
            max_num_slots=limits.max_num_slots,
            max_num_tokens=limits.max_num_tokens,
            max_num_seqs=limits.max_num_seqs,
            max_group_rank=3 * -(-limits.max_lora_rank // 8) * 8,
            max_model_len=limits.max_model_len,
            device=device.device.index or 0,
        )
        self._kernels.load_kernels()

    def set_adapter(self, slot: int, first_page: int, layout: _core.AdapterLayout) -> None:
        self._kernels.set_adapter(slot, first_page, layout, self._device.stream())

    def move_extent(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        self._kernels.move_extent(slot, src_page, dst_page, num_pages, self._device.stream())

    def order_uploads(self) -> None:
        """Let uploads from now on wait for what is queued by now: it may still read their pages."""
        self._kernels.order_uploads(self._device.stream())

    def upload(self, address: int, nbytes: int, first_page: int) -> None:
        """Copy `nbytes` at this host address to the pages from `first_page` on; returns when they are there.

        For loader threads: it runs beside the steps, without the GIL.
        """
        self._kernels.upload(address, nbytes, first_page)

    def begin_step(self, batch: _core.Batch) -> CudaStep:
        return self._step(self._kernels.begin_step(batch, self._device.stream()))

    def begin_padded_step(self, batch: _core.Batch, num_tokens: int, num_items: int) -> CudaStep:
        """A step that only decodes, filled up to `num_tokens` rows that compute nothing anyone reads.

        `num_items`: pieces of adapters' work (`Batch.num_items`) that launches make room for, 0 for none.
        """
        stream = self._device.stream()
        return self._step(
            self._kernels.begin_step(batch, stream, padded_tokens=num_tokens, padded_items=num_items)
        )

    def _step(self, core: _core.CudaStep) -> CudaStep:
        return CudaStep(
            core,
            token_ids=self._device.int32_view(core.token_ids_ptr, core.num_tokens),
            logits_indices=self._device.int32_view(core.logits_indices_ptr, core.num_logits),
        )

    def embedding(self, step: StepHandle, table: Linear) -> torch.Tensor:
        return F.embedding(_own_step(step).token_ids, _own_linear(table).weight)

    def lora_linear(
        self, step: StepHandle, x: torch.Tensor, linear: Linear, layer: int, group: int
    ) -> torch.Tensor:
        own, own_step = _own_linear(linear), _own_step(step)
        self._check("x", x, step.num_tokens, linear.in_features)
        out = F.linear(x, own.weight, own.bias)
        core = own_step.core
        if core.has_adapters:
            self._kernels.lora(core, x.data_ptr(), out.data_ptr(), layer, group, self._device.stream())
        return out

    def logits(self, step: StepHandle, hidden: torch.Tensor, lm_head: Linear) -> torch.Tensor:
        rows = hidden.index_select(0, _own_step(step).logits_indices)
        out = self._logits[: step.num_logits]
        self._device.matmul_float32(rows, _own_linear(lm_head).weight, out)
        return out

    def logits_of(self, rows: torch.Tensor, lm_head: Linear) -> torch.Tensor:
        """Logits of hidden states [N, hidden]: float32 [N, vocab], memory of its own."""
        weight = _own_linear(lm_head).weight
        out = torch.empty(len(rows), len(weight), dtype=torch.float32, device=self.device)
        self._device.matmul_float32(rows, weight, out)
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._norm(x, None, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        self._check("residual", residual, *x.shape)
        return self._norm(x, residual, weight, eps)

    def _norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        num_rows, num_features = x.shape
        self._check("x", x, num_rows, num_features)
        self._check("weight", weight, num_features)
        out = torch.empty_like(x)
        self._kernels.rms_norm(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            num_rows,
            num_features,
            eps,
            self._device.stream(),
        )
        return out

    def rope_and_cache(
        self,
        step: StepHandle,
        qkv: torch.Tensor,
        layer: int,
        cos_sin: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        self._check("qkv", qkv, step.num_tokens, self._qkv_features)
        self._kernels.rope_and_cache(
            _own_step(step).core,
            qkv.data_ptr(),
            layer,
            cos_sin.data_ptr(),
            cos_sin.shape[0],
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            eps,
            self._device.stream(),
        )

    def attention(self, step: StepHandle, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        self._check("qkv", qkv, step.num_tokens, self._qkv_features)
        out = torch.empty(qkv.shape[0], self._attention_features, dtype=self._dtype, device=self.device)
        core, stream = _own_step(step).core, self._device.stream()
        self._kernels.attention(core, qkv.data_ptr(), layer, out.data_ptr(), stream)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_rows, width = gate_up.shape
        if width % 2 != 0:
            raise ValueError(f"gate_up has {width} columns, gate and up must be of one width")
        self._check("gate_up", gate_up, num_rows, width)
        out = torch.empty(num_rows, width // 2, dtype=self._dtype, device=self.device)
        stream = self._device.stream()
        self._kernels.silu_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, width // 2, stream)
        return out

    def sample(self, logits: torch.Tensor, arrays: _core.SampleArrays) -> _core.PendingSamples:
        expected = arrays.num_rows, arrays.vocab_size
        is_float32 = logits.dtype == torch.float32 and logits.device == self.device
        if logits.shape != expected or not is_float32 or not logits.is_contiguous():
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)} on {logits.device}, expected contiguous "
                f"float32 {list(expected)} on {self.device}"
            )
        return self._kernels.sample(logits.data_ptr(), arrays, self._device.stream())

    def _check(self, name: str, tensor: torch.Tensor, *shape: int) -> None:
        """Refuses what the kernels would read past or misread; they only get an address."""
        if (
            tensor.dtype != self._dtype
            or tensor.shape != shape
            or not tensor.is_contiguous()
            or tensor.device != self.device
        ):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected contiguous "
                f"{self._dtype} {shape} on {self.device}"
            )


def _own_linear(linear: Linear) -> DenseLinear:
    assert isinstance(linear, DenseLinear)
    return linear


def _own_step(step: StepHandle) -> CudaStep:
    assert isinstance(step, CudaStep)
    return step
