"""The model on its memory: weights, the pool, and the one call that turns a batch into logits."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import torch

from loraserve import _core
from loraserve.adapters.check import CheckedFiles
from loraserve.adapters.merged_weights import MergedAdapter, MergedWeights
from loraserve.backends import Backend, Extent, open_backend
from loraserve.backends.base import StepRows
from loraserve.config import BLOCK_SIZE, EngineConfig
from loraserve.errors import CapacityError, InvalidRequestError
from loraserve.loader import Checkpoint, LoadedModel, load_model
from loraserve.loader.load import base_shape
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.ops import KvGeometry, Ops, PendingRows
from loraserve.models.shard import Shard
from loraserve.models.weights import BuildDecoder

Result = TypeVar("Result")


class ModelRunner:
    """Owns the loaded model and the page pool; runs one batch at a time.

    Args:
        config: the engine's.
        backend: the device; the one `config.device` means unless given.
    """

    def __init__(self, config: EngineConfig, backend: Backend | None = None) -> None:
        self._config = config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self.backend = open_backend(config) if backend is None else backend
        self.device = self.backend.name
        self.changes_tables = self.backend.changes_tables  # asked by loads, which may outlast the backend
        if config.speculate != "off" and self.backend.runs_ahead:
            raise InvalidRequestError(
                f"speculate is {config.speculate!r}, which only a CPU can do, and the device is "
                f"{self.device}: leave --speculate away, or give --device cpu"
            )
        if config.adapter_dtype != "auto" and not self.backend.keeps_int8_adapters:
            raise InvalidRequestError(
                f"adapter_dtype is {config.adapter_dtype!r}, which only a CPU can compute with, and the "
                f"device is {self.device}: leave --adapter-dtype away, or give --device cpu"
            )
        shard = None if config.tensor_parallel_size == 1 else Shard(0, config.tensor_parallel_size)
        self.merged: CheckedFiles | None = None  # the one adapter that is in the weights
        self.model: LoadedModel = load_model(
            config.model,
            self._dtype,
            self._place,
            config.generation_config,
            None if config.merge is None else self._merge,
            config.quantization,
            keeps_quantized=self.backend.keeps_quantized,
            shard=shard,
        )
        self.adapter_slices = self._adapter_slices(config.tensor_parallel_size)
        self.vocab_size = self.model.config.vocab_size
        self.eos_token_ids = self.producible(self.model.tokenizer.eos_token_ids)

    def _adapter_slices(self, num_ranks: int) -> list[_core.AdapterSlice]:
        """What each rank has of adapters; empty where there is one."""
        ranks = range(num_ranks) if num_ranks > 1 else ()
        model, dtype = self.model.config, self._config.dtype
        return [Shard(rank, num_ranks).adapter_slice(model, dtype) for rank in ranks]

    def _merge(self, checkpoint: Checkpoint) -> MergedWeights:
        config, name = self._config, self._config.merge
        assert name is not None, "invariant: called where an adapter is merged"
        adapter = MergedAdapter(
            name,
            os.path.abspath(config.adapters[name]),
            config.manifests.get(name),
            config.model_names,
            config.max_lora_rank,
        )
        weights = MergedWeights(checkpoint, adapter, self._dtype)
        self.merged = weights.files
        return weights

    def _place(self, model_config: ModelConfig, build: BuildDecoder) -> tuple[Decoder, int]:
        """The model on its device, and the context that its memory lets a request have."""
        geometry = KvGeometry(
            num_layers=model_config.num_layers,
            num_heads=model_config.num_heads,
            num_kv_heads=model_config.num_kv_heads,
            head_dim=model_config.head_dim,
            block_size=BLOCK_SIZE,
        )
        placed = self.backend.place(model_config, geometry, build)
        self.page_nbytes = geometry.page_nbytes(self._dtype)
        self.num_pages = placed.num_pages
        self.host_tier_nbytes = placed.host_tier_nbytes
        self.ops: Ops = placed.ops
        return placed.decoder, placed.max_model_len

    def producible(self, token_ids: Iterable[int], added: Collection[int] = ()) -> list[int]:
        """Those that the model has logits for, or that are `added` to it."""
        return [id_ for id_ in token_ids if 0 <= id_ < self.vocab_size or id_ in added]

    def check_token_ids(self, token_ids: Iterable[int], added: Collection[int] = ()) -> None:
        """Whether all are in the vocabulary, or `added` to it.

        Raises:
            InvalidRequestError: one is not.
        """
        vocab_size = self.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size and token_id not in added:
                and_added = f" and the adapter adds {len(added)}" if added else ""
                raise InvalidRequestError(
                    f"token id {token_id} is out of range, the vocabulary has {vocab_size} tokens{and_added}"
                )

    def are_own(self, token_ids: Iterable[int]) -> bool:
        """Whether none is beyond the model's vocabulary."""
        return max(token_ids, default=0) < self.vocab_size

    @property
    def pool(self) -> torch.Tensor:
        """All pages: uint8, on the device."""
        return self.backend.pool

    @property
    def max_num_slots(self) -> int:
        """Adapters that can be resident at once, however small they are."""
        return self.backend.max_num_slots(self.num_pages)

    @property
    def base_shape(self) -> _core.BaseShape:
        """What adapters are checked against."""
        return base_shape(self.model.config, self.adapter_slices)

    def extent(self, slot: int, first_page: int, num_pages: int) -> Extent:
        """Pages of the pool as the place, in bytes, that an adapter is read into."""
        return Extent(slot, first_page, num_pages * self.page_nbytes)

    def bind(self, extent: Extent, layout: _core.AdapterLayout) -> None:
        """Make the adapter in `extent` the one that `extent.slot` means."""
        self.ops.set_adapter(extent.slot, extent.first_page, layout)

    def move(self, slot: int, src_page: int, dst_page: int, num_pages: int) -> None:
        """Move an adapter's pages inside the pool, which may overlap, and bind its slot to the new place."""
        self.ops.move_extent(slot, src_page, dst_page, num_pages)

    def release(self) -> None:
        """Give up weights and pool; nothing may be run later. Safe to call twice."""
        backend: Backend | None = vars(self).pop("backend", None)
        if backend is not None:
            backend.shutdown()
        vars(self).pop("ops", None)
        self.model.release()

    def execute(self, batch: _core.Batch) -> torch.Tensor:
        """Logits of the rows the batch samples: float32 [L, vocab].

        Where the device's memory falls short, once more with what it keeps for later given back.

        Raises:
            torch.OutOfMemoryError: that did not help; `out_of_memory` makes it an answer.
        """
        return self._run(self.backend.logits, batch)

    def execute_with_rows(self, batch: _core.Batch) -> StepRows:
        """As `execute`, of a batch that gives out hidden states."""
        return self._run(self.backend.rows, batch)

    @torch.inference_mode()
    def _run(self, run: Callable[[Decoder, _core.Batch], Result], batch: _core.Batch) -> Result:
        try:
            return run(self.model.decoder, batch)
        except torch.OutOfMemoryError:
            pass  # what the failed run has made is kept alive until here
        self.backend.empty_caches()
        return run(self.model.decoder, batch)

    def out_of_memory(self, batch: _core.Batch, error: torch.OutOfMemoryError) -> CapacityError:
        """What a step's requests are told that found no memory; later steps have what it gave up."""
        self.backend.empty_caches()
        return CapacityError(
            f"the device ran out of memory in a step of {batch.num_tokens} tokens of {batch.num_seqs} "
            f"requests: lower max_batched_tokens, max_num_seqs or memory ({error})"
        )

    def sample(self, logits: torch.Tensor, arrays: _core.SampleArrays) -> PendingRows:
        """Begin to choose a token for each row of `logits`, where they are."""
        return self.ops.sample(logits, arrays)
