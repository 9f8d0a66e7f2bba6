"""`UnpackedAdapter`: an adapter's matrices in float32, as the core reads and checks them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraserve import _core
from loraserve.errors import AdapterFormatError

if TYPE_CHECKING:
    from loraserve._core import _BaseLinears
    from loraserve.adapters.stored import StoredAdapter

PANEL_WIDTH = 16  # rows of a matrix that lie together, see rust/adapters/src/layout.rs


@dataclass(frozen=True)
class UnpackedModule:
    """What one linear becomes: gain ⊙ (W·x + bias + scale·B·(A·x)) + shift.

    A [rank, in_features], B [out_features, rank], without rows and columns that only pad; rank 0 where the
    adapter trained nothing but a bias. `gain` and `shift` [out_features], None where they are 1 and 0.
    """

    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None
    shift: Tensor | None

    def delta(self) -> Tensor:
        """scale·B·A: [out_features, in_features]."""
        return (self.b @ self.a) * self.scale


class UnpackedAdapter:
    """All of an adapter; takes 4 bytes a parameter of it.

    Args:
        path: where it lies, or what stands for that.
        shape: arguments of `_core.BaseShape`.
        biased: paths of linears that have a bias.
        receipt: of its check for float32, which compared copies of the base's weights.
        base_linears: the base's, where gains and shifts depend on it.
        stored: has the weights where they are not read at `path`.

    Raises:
        AdapterFormatError, AdapterUnavailableError: it can't be read, or changed since it was checked.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, list[tuple[str, int, int, int, int]]],
        biased: list[str],
        receipt: _core.Receipt,
        base_linears: _BaseLinears | None = None,
        stored: StoredAdapter | None = None,
    ) -> None:
        if receipt.changes_tables:
            raise AdapterFormatError(
                f"{path} changes embedding, head or norms (by its rows, tokens or LoRA on them), "
                "which can't be merged yet: serve it as it is, or merge it with PEFT"
            )
        base_shape = _core.BaseShape(*shape, biased)
        rank = max(receipt.rank, 1)
        files = None if stored is None else stored.files
        self._bytes = torch.empty(receipt.nbytes, dtype=torch.uint8)
        layout = _core.load_adapter(
            path,
            base_shape,
            "float32",
            rank,
            receipt.hash,
            self._bytes.data_ptr(),
            receipt.nbytes,
            base_linears=base_linears,
            stored=files,
            known=receipt,
        )
        self._columns = {place[:3]: place[3:] for place in layout.columns()}
        paths = {(group, out_offset): path for path, group, _, _, out_offset in shape[1]}
        self._places = {
            f"model.layers.{layer}.{paths[group, module[3]]}": (
                layer,
                group,
                a_offset,
                rows,
                in_features,
                module,
            )
            for layer, group, a_offset, rows, in_features, modules in layout.groups()
            for module in modules
        }

    def __contains__(self, path: str) -> bool:
        return path in self._places

    def __iter__(self) -> Iterator[str]:
        """Paths of the adapted linears, `model.layers.3.self_attn.q_proj`."""
        return iter(self._places)

    def __getitem__(self, path: str) -> UnpackedModule:
        layer, group, a_offset, rows, in_features, module = self._places[path]
        rank_offset, rank, b_offset, out_offset, out_features, scale = module
        first = out_offset % PANEL_WIDTH
        num_panels = -(-(first + out_features) // PANEL_WIDTH)
        a = _from_panels(self._floats(a_offset, rows * in_features), rows, in_features)
        b = _from_panels(
            self._floats(b_offset, num_panels * PANEL_WIDTH * rank), num_panels * PANEL_WIDTH, rank
        )
        a, b = a[rank_offset : rank_offset + rank], b[first : first + out_features]
        used = a.any(dim=1) | b.any(dim=0)
        true_rank = int(used.nonzero().max()) + 1 if used.any() else min(rank, 1)
        gain = shift = None
        columns = self._columns.get((layer, group, out_offset))
        if columns is not None:
            offset, has_gain, has_shift = columns
            both = self._floats(offset, num_panels * 2 * PANEL_WIDTH).view(num_panels, 2, PANEL_WIDTH)
            gains, shifts = (both[:, kind].reshape(-1)[first : first + out_features] for kind in (0, 1))
            gain, shift = gains if has_gain else None, shifts if has_shift else None
        return UnpackedModule(a[:true_rank].clone(), b[:, :true_rank].clone(), scale, gain, shift)

    def has_shift(self, path: str) -> bool:
        """Whether its output is shifted, of a linear that is adapted."""
        layer, group, *_, module = self._places[path]
        return bool(self._columns.get((layer, group, module[3]), (0, False, False))[2])

    def _floats(self, offset: int, count: int) -> Tensor:
        return self._bytes[offset : offset + 4 * count].view(torch.float32)


def _from_panels(values: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix [rows, columns] of panels of 16 rows, the last of which may have 8."""
    panels, rest = divmod(rows, PANEL_WIDTH)
    whole = panels * PANEL_WIDTH
    matrix = (
        values[: whole * columns].view(panels, columns, PANEL_WIDTH).transpose(1, 2).reshape(whole, columns)
    )
    if rest == 0:
        return matrix
    return torch.cat([matrix, values[whole * columns :].view(columns, rest).T])
