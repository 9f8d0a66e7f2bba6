"""Adapter matrices in panels, as `rust/adapters/src/layout.rs` describes them, element by element."""

import torch


def pack_of(dtype: torch.dtype) -> int:
    """Neighbours along k that lie together."""
    return 1 if dtype == torch.int8 else 4 // dtype.itemsize


def panel_index(rows: int, k: int, pack: int) -> torch.Tensor:
    """Where element (row, k) of a matrix [rows, k] lies: int64 [rows, k].

    A panel holds 16 rows, the last one 8 where only 8 are left, as [k / pack][rows][pack].
    """
    padded = -(-k // pack) * pack
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(k), indexing="ij")
    first = row // 16 * 16
    width = (rows - first).clamp(max=16)
    return first * padded + (column // pack * width + row - first) * pack + column % pack


def pack_panels(matrix: torch.Tensor) -> torch.Tensor:
    """The elements of `matrix` [rows, k] in panels; rows is a multiple of 8."""
    rows, k = matrix.shape
    pack = pack_of(matrix.dtype)
    packed = torch.zeros(rows * -(-k // pack) * pack, dtype=matrix.dtype)
    packed[panel_index(rows, k, pack).reshape(-1)] = matrix.reshape(-1)
    return packed


def unpack_panels(data: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """The matrix [rows, k] whose panels begin at `data`."""
    return data[panel_index(rows, k, pack_of(data.dtype))]


def pack_columns(values: torch.Tensor) -> torch.Tensor:
    """Gains and shifts [2, columns] by panels of 16: [columns / 16][2][16]."""
    return values.view(2, -1, 16).transpose(0, 1).contiguous().view(-1)
