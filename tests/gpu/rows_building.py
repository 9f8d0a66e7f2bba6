"""Kernels of a small model beside the reference, for the ops that attend, rotate or look at single rows."""

from dataclasses import dataclass

import numpy as np
import torch
from loraserve import _core
from loraserve.models.ops import KvGeometry

from tests.batches import HandBatch
from tests.gpu.device import Gpu
from tests.ops.torch_ops import TorchOps, TorchStep

MAX_POSITION = 2048
DTYPES = (torch.bfloat16, torch.float16)
# Distance of neighbouring values, relative to them: sums of another order round to either.
SPACING = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def cos_sin(head_dim: int) -> torch.Tensor:
    angles = torch.arange(MAX_POSITION)[:, None] / 100 ** (torch.arange(head_dim // 2) * 2 / head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def assert_neighbours(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Every element is the expected one or a neighbour of it."""
    assert actual.dtype == expected.dtype
    spacing = SPACING[actual.dtype] * expected.float().abs() + 1e-6
    excess = ((actual.float() - expected.float()).abs() / spacing).max().item()
    assert excess <= 1, f"{excess:.2f} times the distance of neighbours"


@dataclass(frozen=True)
class Model:
    """Kernels and reference over one pool, which starts as NaN."""

    gpu: Gpu
    geometry: KvGeometry
    dtype: torch.dtype
    pool: torch.Tensor
    kernels: _core.CudaKernels
    reference: TorchOps
    cos_sin: torch.Tensor
    generator: torch.Generator

    def random(self, *shape: int) -> torch.Tensor:
        return self.gpu.place(torch.randn(*shape, generator=self.generator).to(self.dtype))

    def random_qkv(self, num_tokens: int) -> torch.Tensor:
        return self.random(num_tokens, self.geometry.qkv_features)

    def begin(self, batch: HandBatch, padded_tokens: int | None = None) -> _core.CudaStep:
        return self.kernels.begin_step(batch.build(), self.gpu.stream, padded_tokens=padded_tokens)

    def begin_reference(self, batch: HandBatch) -> TorchStep:
        return self.reference.begin_step(batch.build())

    def rope(
        self,
        step: _core.CudaStep,
        qkv: torch.Tensor,
        layer: int = 0,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> None:
        """In place, as the reference does it."""
        norms = [None if norm is None else norm.data_ptr() for norm in (q_norm, k_norm)]
        self.kernels.rope_and_cache(
            step, qkv.data_ptr(), layer, self.cos_sin.data_ptr(), MAX_POSITION, *norms, eps, self.gpu.stream
        )
        self.gpu.synchronize()

    def attention(self, step: _core.CudaStep, qkv: torch.Tensor, layer: int = 0) -> torch.Tensor:
        out = self.gpu.zeros(
            len(qkv), self.geometry.num_heads * self.geometry.head_dim, dtype=self.dtype
        ).fill_(torch.nan)
        self.kernels.attention(step, qkv.data_ptr(), layer, out.data_ptr(), self.gpu.stream)
        self.gpu.synchronize()
        return out

    def pages(self) -> torch.Tensor:
        """[page, layer, K/V, kv_head, offset, D]"""
        shape = (self.geometry.num_layers, 2, self.geometry.num_kv_heads, 16, self.geometry.head_dim)
        return self.pool.view(self.dtype).view(-1, *shape)

    def fill(self, table: np.ndarray, num_tokens: int) -> None:
        """Random K and V of all layers for a sequence on the pages of `table`; what is behind it stays."""
        pages, positions = self.pages(), torch.arange(num_tokens)
        page = torch.from_numpy(table.astype(np.int64))[positions // 16]
        values = torch.randn(num_tokens, *pages.shape[1:4], pages.shape[5], generator=self.generator)
        pages[page, :, :, :, positions % 16] = values.to(pages)


def make_model(
    gpu: Gpu,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    num_layers: int = 1,
    num_pages: int = 80,
    max_num_tokens: int = 1024,
) -> Model:
    """`heads`: heads, kv heads, head_dim."""
    geometry = KvGeometry(num_layers, *heads)
    pool = gpu.zeros(num_pages * geometry.page_nbytes(dtype), dtype=torch.uint8).fill_(0xFF)
    kernels = gpu.kernels(
        geometry, dtype, pool, groups=[(32, 32)] * 4, max_num_tokens=max_num_tokens, max_num_seqs=256
    )
    reference = TorchOps(geometry, dtype, pool)
    generator = torch.Generator().manual_seed(0)
    angles = gpu.place(cos_sin(geometry.head_dim))
    return Model(gpu, geometry, dtype, pool, kernels, reference, angles, generator)
