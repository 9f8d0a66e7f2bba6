"""The reference backend: plain torch on any device, slow and obviously right; the oracle of kernel tests."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from loraserve import _core
from loraserve.models.ops import KvGeometry, Linear, ReadyRows, StepHandle
from loraserve.models.quantized import dequantize

from tests.panels import pack_of

PANEL_WIDTH = 16  # rows of an adapter's matrix that lie together


@dataclass(frozen=True)
class TorchLinear:
    """A weight [out, in] as torch keeps it."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class TorchStep:
    """A batch, its arrays as tensors on the backend's device."""

    arrays: Mapping[str, npt.NDArray[Any]]
    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    logits_indices: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_logits(self) -> int:
        return len(self.logits_indices)


@dataclass(frozen=True)
class Module:
    """One adapted module in float32: A [rank, in], Bᵀ [rank, out], gain and shift [out] where it has them."""

    a: torch.Tensor
    bt: torch.Tensor
    out_offset: int
    scale: float
    gain: torch.Tensor | None
    shift: torch.Tensor | None


@dataclass(frozen=True)
class _BoundAdapter:
    first_page: int
    layout: _core.AdapterLayout


class TorchOps:
    """`EagerOps` in plain torch; adapters and KV are read from the pool's bytes, arithmetic is float32.

    Inside a page, K and V blocks are both stored [16 tokens][D].
    """

    def __init__(self, geometry: KvGeometry, dtype: torch.dtype, pool: torch.Tensor) -> None:
        self._geometry = geometry
        self._dtype = dtype
        self._pool = pool
        self._page_nbytes = geometry.page_nbytes(dtype)
        num_pages = pool.numel() // self._page_nbytes
        pages = pool[: num_pages * self._page_nbytes].view(dtype)
        self._pages = pages.view(
            num_pages,
            geometry.num_layers,
            2,
            geometry.num_kv_heads,
            geometry.block_size,
            geometry.head_dim,
        )
        self._slots: dict[int, _BoundAdapter] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._pool.device

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> TorchLinear:
        return TorchLinear(self._stored(weight), None if bias is None else self._stored(bias))

    def pack_quantized(
        self, parts: list[_core.QuantizedWeight], bias: torch.Tensor | None = None
    ) -> TorchLinear:
        return self.pack(torch.cat([dequantize(part) for part in parts]), bias)

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device=self.device, dtype=self._dtype)

    def set_adapter(self, slot: int, first_page: int, layout: _core.AdapterLayout) -> None:
        self._slots[slot] = _BoundAdapter(first_page, layout)

    def move_extent(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        pages = self._pool[: len(self._pages) * self._page_nbytes].view(-1, self._page_nbytes)
        pages[dst_page : dst_page + num_pages] = pages[src_page : src_page + num_pages].clone()
        if slot in self._slots:
            self._slots[slot] = _BoundAdapter(dst_page, self._slots[slot].layout)

    def begin_step(self, batch: _core.Batch) -> TorchStep:
        arrays: Any = batch.arrays()
        return TorchStep(
            arrays=arrays,
            token_ids=self._indices(arrays["token_ids"]),
            positions=self._indices(arrays["positions"]),
            slot_mapping=self._indices(arrays["slot_mapping"]),
            logits_indices=self._indices(arrays["logits_indices"]),
        )

    def _indices(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def embedding(self, step: StepHandle, table: Linear) -> torch.Tensor:
        return _own_linear(table).weight[_own_step(step).token_ids]

    def lora_linear(
        self, step: StepHandle, x: torch.Tensor, linear: Linear, layer: int, group: int
    ) -> torch.Tensor:
        own = _own_linear(linear)
        out = F.linear(x.float(), own.weight.float())
        if own.bias is not None:
            out += own.bias.float()
        adapted = list(self._adapted(_own_step(step).arrays, layer, group))
        for rows, weight, module, columns in adapted:
            shrunk = x[rows].float() @ module.a.T
            out[rows, columns] += (shrunk * (weight * module.scale)) @ module.bt
        for rows, weight, module, columns in adapted:
            if module.gain is not None:
                out[rows, columns] *= module.gain
            if module.shift is not None:
                out[rows, columns] += weight * module.shift
        return out.to(self._dtype)

    def _adapted(
        self, arrays: Mapping[str, npt.NDArray[Any]], layer: int, group: int
    ) -> Iterator[tuple[slice, float, Module, slice]]:
        """Rows, weight, module and its columns, wave after wave."""
        for segment in range(len(arrays["seg_start"])):
            rows = slice(int(arrays["seg_start"][segment]), int(arrays["seg_end"][segment]))
            weight = float(arrays["seg_weight"][segment])
            for module in self.modules(int(arrays["seg_slot"][segment]), layer, group):
                yield rows, weight, module, slice(module.out_offset, module.out_offset + module.bt.shape[1])

    def modules(self, slot: int, layer: int, group: int) -> list[Module]:
        """The modules a slot's adapter has at (layer, group), read from the pool."""
        bound = self._slots[slot]
        base = bound.first_page * self._page_nbytes
        offsets = {place[:3]: place[3:] for place in bound.layout.columns()}
        scale_offsets = {place[:2]: place[2] for place in bound.layout.scales()}
        for entry_layer, entry_group, a_offset, rank, in_features, places in bound.layout.groups():
            if (entry_layer, entry_group) == (layer, group):
                dtype, scales = self._dtype, None
                if (layer, group) in scale_offsets:
                    dtype, start = torch.int8, base + scale_offsets[layer, group]
                    scales = self._pool[start : start + 4 * rank].view(torch.float32)
                a = self._matrix(base + a_offset, rank, in_features, dtype)
                if scales is not None:
                    a *= scales[:, None]
                modules = []
                for rank_offset, module_rank, b_offset, out_offset, out_features, scale in places:
                    lane = out_offset % PANEL_WIDTH
                    rows = -(-(lane + out_features) // PANEL_WIDTH) * PANEL_WIDTH
                    b = self._matrix(base + b_offset, rows, module_rank, dtype)[lane : lane + out_features]
                    ranks = slice(rank_offset, rank_offset + module_rank)
                    gain = shift = None
                    if (layer, group, out_offset) in offsets:
                        offset, *has = offsets[layer, group, out_offset]
                        gain, shift = (
                            values[lane : lane + out_features] if is_there else None
                            for values, is_there in zip(self._columns(base + offset, rows), has, strict=True)
                        )
                    modules.append(Module(a[ranks], b.T, out_offset, scale, gain, shift))
                return modules
        return []

    def _matrix(self, offset: int, rows: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [rows, k] at `offset`, from panels [k/pack][16 rows][pack]; the last may have 8 rows."""
        pack = pack_of(dtype)
        packs, values = -(-k // pack), self._pool[offset:].view(dtype)
        panels = [torch.zeros(0, packs * pack, dtype=dtype, device=self._pool.device)]
        for first in range(0, rows, PANEL_WIDTH):
            width = min(PANEL_WIDTH, rows - first)
            panel = values[first * packs * pack :][: packs * width * pack].view(packs, width, pack)
            panels.append(panel.transpose(0, 1).reshape(width, packs * pack))
        return torch.cat(panels)[:, :k].float()

    def _columns(self, offset: int, count: int) -> torch.Tensor:
        """Gains and shifts [2, count] at `offset`."""
        values = self._pool[offset : offset + 8 * count].view(torch.float32)
        return values.view(-1, 2, PANEL_WIDTH).transpose(0, 1).reshape(2, count)

    def logits(self, step: StepHandle, hidden: torch.Tensor, lm_head: Linear) -> torch.Tensor:
        rows = hidden[_own_step(step).logits_indices].float()
        return F.linear(rows, _own_linear(lm_head).weight.float())

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return (normed * weight.float()).to(self._dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual.copy_(x.float() + residual.float())
        return self.rms_norm(residual, weight, eps)

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
        geometry, own = self._geometry, _own_step(step)
        heads = qkv.view(step.num_tokens, -1, geometry.head_dim)
        q = heads[:, : geometry.num_heads]
        k = heads[:, geometry.num_heads : geometry.num_heads + geometry.num_kv_heads]
        v = heads[:, geometry.num_heads + geometry.num_kv_heads :]
        for part, norm in ((q, q_norm), (k, k_norm)):
            if norm is not None:
                part.copy_(self.rms_norm(part, norm, eps))
            part.copy_(_rotated(part.float(), cos_sin[own.positions]))
        pages = own.slot_mapping // geometry.block_size
        offsets = own.slot_mapping % geometry.block_size
        self._pages[pages, layer, 0, :, offsets] = k
        self._pages[pages, layer, 1, :, offsets] = v

    def attention(self, step: StepHandle, qkv: torch.Tensor, layer: int) -> torch.Tensor:
        geometry, arrays = self._geometry, _own_step(step).arrays
        out = torch.empty(
            step.num_tokens, geometry.num_heads * geometry.head_dim, dtype=self._dtype, device=self.device
        )
        for sequence, context_len in enumerate(arrays["context_lens"].tolist()):
            rows = slice(int(arrays["query_indptr"][sequence]), int(arrays["query_indptr"][sequence + 1]))
            blocks = slice(
                int(arrays["block_table_indptr"][sequence]), int(arrays["block_table_indptr"][sequence + 1])
            )
            pages = self._pages[self._indices(arrays["block_table"][blocks]), layer]
            # [page, K/V, head, offset, D] -> [K/V, head, position, D]
            kv = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len].float()
            q = qkv[rows, : out.shape[1]].view(-1, geometry.num_heads, geometry.head_dim).float()
            out[rows] = self._attend(q, kv[0], kv[1]).to(self._dtype)
        return out

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [Q, H, D] are the last Q positions of k, v [KV, context, D]: [Q, H·D]."""
        group_size = self._geometry.num_heads // self._geometry.num_kv_heads
        k, v = (t.repeat_interleave(group_size, dim=0) for t in (k, v))
        scores = torch.einsum("qhd,hcd->hqc", q, k) / math.sqrt(self._geometry.head_dim)
        context = torch.arange(k.shape[1], device=self.device)
        positions = context[k.shape[1] - q.shape[0] :]
        scores = scores.masked_fill(context[None, :] > positions[:, None], -math.inf)
        return torch.einsum("hqc,hcd->qhd", scores.softmax(-1), v).flatten(1)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (F.silu(gate) * up).to(self._dtype)

    def sample(self, logits: torch.Tensor, arrays: _core.SampleArrays) -> ReadyRows:
        logits = logits.cpu().contiguous()
        return ReadyRows(_core.HostSampler().sample(logits.data_ptr(), *logits.shape, arrays))


def _own_linear(linear: Linear) -> TorchLinear:
    if not isinstance(linear, TorchLinear):
        raise TypeError(f"{type(linear).__name__} was packed by another backend")
    return linear


def _own_step(step: StepHandle) -> TorchStep:
    if not isinstance(step, TorchStep):
        raise TypeError(f"{type(step).__name__} was begun by another backend")
    return step


def _rotated(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [T, heads, D] by the angles whose cosines and sines are cos_sin [T, D]."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
