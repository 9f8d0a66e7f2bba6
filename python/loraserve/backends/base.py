"""`Backend`: what the runner asks of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

    from loraserve import _core
    from loraserve.models.config import ModelConfig
    from loraserve.models.decoder import Decoder
    from loraserve.models.ops import KvGeometry, Ops
    from loraserve.models.weights import BuildDecoder


# Packs an adapter into so many writable bytes at an address; raises LoraserveError.
Load: TypeAlias = "Callable[[int, int], _core.AdapterLayout]"


@dataclass(frozen=True)
class Extent:
    """Where an adapter is to lie: `nbytes` from page `first_page` of the pool on, bound to `slot`."""

    slot: int
    first_page: int
    nbytes: int


@dataclass(frozen=True)
class PlacedModel:
    """A model on its device: weights, what computes them, the pool in pages, the context in tokens.

    `host_tier_nbytes` of main memory are left for adapters that the pool gives up.
    """

    decoder: Decoder
    ops: Ops
    num_pages: int
    max_model_len: int
    host_tier_nbytes: int


@dataclass(frozen=True)
class StepRows:
    """A step that gives out hidden states beside logits.

    Args:
        logits: of the sampled rows: float32 [L, vocab], good until the next step.
        hidden: behind the final norm, [H, hidden] in the storage dtype on the device.
        logits_of: (first, count) → logits of these of the H rows, float32 [count, vocab], until the
            next step.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    logits_of: Callable[[int, int], torch.Tensor]


class BaseLinears(Protocol):
    """The model's linears as `_core.load_adapter` asks for them; bytes are float32."""

    def row_norms(
        self, layer: int, group: int, first: int, count: int, rank: int, at: bytes, b: bytes
    ) -> bytes:
        """Lengths of the rows `first` … `first + count` of the fused weight plus B·A: float32 [count].

        `at`: A transposed [in_features, rank]; `b`: B [count, rank], scaled.
        """
        ...

    def rows_per_call(self, in_features: int, rank: int) -> int:
        """Rows that one call of `row_norms` takes at most."""
        ...

    def bias(self, layer: int, group: int, first: int, count: int) -> bytes:
        """The bias of these rows: float32 [count]."""
        ...


class Backend(Protocol):
    """One device: its pool of pages, the ops over it, adapters on their way in."""

    name: str
    computes_on_cpu: bool  # whether loader threads take cores from the model
    changes_tables: bool  # whether adapters may change embedding, head, norms
    keeps_quantized: bool  # whether it computes with quantised weights, or all are dequantised
    keeps_int8_adapters: bool  # whether it computes with adapters in int8
    runs_ahead: bool  # whether a step may be launched before the tokens of the last are known to the host

    def place(self, model: ModelConfig, geometry: KvGeometry, build: BuildDecoder) -> PlacedModel:
        """Share out the device's memory: weights, which `build` loads, and the pool.

        Raises:
            CapacityError: weights, pool or context that was asked for don't fit; the message has sizes.
            DeviceError, ModelError: the device can't run the model.
        """
        ...

    def max_num_slots(self, num_pages: int) -> int:
        """Adapters that can be resident at once, however small they are."""
        ...

    @property
    def pool(self) -> torch.Tensor:
        """The pages: uint8, on the device."""
        ...

    @property
    def base_linears(self) -> _core.CpuBaseLinears | BaseLinears:
        """What DoRA's gains and trained biases are computed from, on loader threads, once it is placed."""
        ...

    def order_loads(self) -> None:
        """Loads from now on begin after what is queued by now: it may still use their pages."""
        ...

    def fill(self, extent: Extent, load: Load, packed_nbytes: int) -> _core.AdapterLayout:
        """Have `load` write the adapter to host memory, bring it to its extent, return when it is there.

        `packed_nbytes` are what it takes as `load` writes it.

        Called from loader threads.
        """
        ...

    def restore(self, extent: Extent, packed: _core.PackedAdapter, pace: _core.LoadPace) -> None:
        """Bring an adapter from the host tier to its extent by one copy, and return when it is there.

        Called from loader threads.
        """
        ...

    def start(self, wake: Callable[[], None]) -> None:
        """The model is loaded: begin what goes on beside the steps.

        `wake` is called, from any thread, once `check` has something to raise; it doesn't hold the engine.
        """
        ...

    def check(self) -> None:
        """Raises DeviceError: no step can be computed any more."""
        ...

    def set_contended(self, is_contended: bool) -> None:
        """Say whether the model computes now on every core: what goes on beside it then keeps back."""
        ...

    def shutdown(self) -> None:
        """End what `start` began."""
        ...

    def logits(self, decoder: Decoder, batch: _core.Batch) -> torch.Tensor:
        """Run one step: float32 [L, vocab], good until the next one. Raises torch.OutOfMemoryError."""
        ...

    def rows(self, decoder: Decoder, batch: _core.Batch) -> StepRows:
        """Run one step that gives out `batch.num_hidden` rows. Raises torch.OutOfMemoryError."""
        ...

    def empty_caches(self) -> None:
        """Give back memory that is kept for later steps, after one found none."""
        ...
