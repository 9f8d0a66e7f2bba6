"""`AdapterCheck`: adapters on disk, or kept in the store, compared with all of one base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loraserve import _core
from loraserve.adapters.beside import BesideReader, has_files
from loraserve.adapters.containers import convert
from loraserve.adapters.manifest import AdapterManifest, has_manifest, read_manifest
from loraserve.adapters.served_base import BaseComparison, ServedBase
from loraserve.adapters.stored import AdapterStore, StoredAdapter
from loraserve.adapters.text import AdapterText, AddedTokens
from loraserve.errors import AdapterFormatError, ModelError
from loraserve.loader.base_weights import BaseWeights
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.fingerprint import fingerprint
from loraserve.loader.load import base_shape
from loraserve.models.config import ModelConfig
from loraserve.pooling.head import ClassificationHead, HeadMemory
from loraserve.pooling.params import PoolingKind
from loraserve.pooling.sentence_transformers import pooling_beside
from loraserve.validation.files import is_regular_file
from loraserve.validation.json_file import read_json

MAX_HEADS_NBYTES = 2**30  # of all adapters of an engine
CONFIG = "config.json"  # of the model that the adapter was trained as


@dataclass(frozen=True)
class CheckedFiles:
    """All of an adapter: its weights' receipt, its manifest, and what holds for its requests.

    `path` is where it lies, or what stands for that; `stored` has the weights where they are not read there;
    `head` is what it classifies with;
    `manifest_directory` is where a manifest lies, or would, None where none is looked for.
    """

    path: str
    receipt: _core.Receipt
    manifest: AdapterManifest
    text: AdapterText
    base: BaseComparison
    manifest_directory: str | None
    stored: StoredAdapter | None = None
    head: ClassificationHead | None = None

    def try_chat(self) -> None:
        """Try out what the manifest asks of chats. Raises InvalidRequestError."""
        tokenizer = self.text.tokenizer
        if self.manifest.chat_template is not None and tokenizer.chat_template is not None:
            tokenizer.chat_template.check()
        if self.manifest.system_prompt is not None:
            tokenizer.apply_chat_template(
                self.manifest.with_system_prompt([{"role": "user", "content": "hello"}])
            )


def open_check(
    checkpoint: Checkpoint, names: tuple[str, ...], dtype: str, max_lora_rank: int
) -> AdapterCheck:
    """The check against a model that is not loaded, which `names` mean. Raises ModelError."""
    base = ServedBase(checkpoint.path, fingerprint(checkpoint), names)
    beside = BesideReader(
        checkpoint.path,
        checkpoint.load_tokenizer(),
        checkpoint.config.vocab_size,
        checkpoint.sampling_defaults(),
    )
    weights = BaseWeights(checkpoint.path, dtype)
    return AdapterCheck(checkpoint.config, dtype, max_lora_rank, base, weights, beside)


class AdapterCheck:
    """Checks adapters; safe to use from several threads.

    Args:
        config: the base model's.
        dtype: in which weights are stored.
        max_lora_rank: adapters of a higher rank are refused.
        base: the base model, as adapters say which one they are of.
        base_weights: the base model's, to compare embeddings and heads with.
        beside: reads what lies beside the weights.
        adapter_dtype: as of `EngineConfig`.
        slices: what ranks have of adapters, where the model is shared out.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: str,
        max_lora_rank: int,
        base: ServedBase,
        base_weights: BaseWeights,
        beside: BesideReader,
        adapter_dtype: str = "auto",
        slices: Sequence[_core.AdapterSlice] = (),
    ) -> None:
        self.shape = base_shape(config, slices)
        self.store = AdapterStore()
        self.dtype = dtype
        self.max_lora_rank = max_lora_rank
        self.adapter_dtype = adapter_dtype
        self.base = base
        self.base_weights = base_weights
        self._config = config
        self._beside = beside
        self._heads = HeadMemory(MAX_HEADS_NBYTES)

    def check_weights(
        self, path: str, pace: _core.LoadPace | None = None, stored: StoredAdapter | None = None
    ) -> _core.Receipt:
        """Read and check what is applied: of the directory `path`, or what is stored for it.

        Raises AdapterFormatError.
        """
        files = None if stored is None else stored.files
        return _core.check_adapter(
            path,
            self.shape,
            self.dtype,
            self.max_lora_rank,
            pace,
            self.base_weights,
            files,
            self.adapter_dtype,
        )

    def check(
        self,
        source: str | StoredAdapter,
        pace: _core.LoadPace | None = None,
        manifest: AdapterManifest | None = None,
    ) -> CheckedFiles:
        """The weights and all that lies beside them.

        Args:
            source: a PEFT directory, a GGUF adapter, TensorRT-LLM's arrays, or what the store has.
            pace: how fast files are read.
            manifest: goes over the directory's own.

        Raises:
            AdapterFormatError: something of it can't be read, or can't be used with this model, or it is
                stamped for another.
            CapacityError: as of `BesideReader.read`, or there is no room for what it becomes or its head.
            OverloadedError: as of `BesideReader.read`.
        """
        stored = source if isinstance(source, StoredAdapter) else convert(source, self._config, self.store)
        path = source.source if isinstance(source, StoredAdapter) else source
        receipt = self.check_weights(path, pace, stored)
        directories = _directories(receipt, path, stored)
        with_own = next(filter(has_manifest, directories), None)
        own = None if with_own is None else read_manifest(with_own)
        manifest = (manifest or AdapterManifest()).merged_over(own)
        if manifest.pooling is None:
            manifest = replace(manifest, pooling=_pooling(directories))
        base = self.base.compare(path, manifest, receipt.base_model)
        beside = next(filter(has_files, reversed(directories)), directories[0] if directories else None)
        text = self._beside.read(beside, manifest.chat_template, AddedTokens.of(receipt))
        notes = [*(() if stored is None else stored.notes), *text.notes]
        if base.warning is not None:
            notes.append(base.warning)
        return CheckedFiles(
            path if stored is not None else receipt.directory,
            receipt.with_beside(notes, list(text.not_used)),
            manifest,
            text,
            base,
            with_own or next(reversed(directories), None),
            stored,
            self._head(receipt, directories),
        )

    def _head(self, receipt: _core.Receipt, directories: list[str]) -> ClassificationHead | None:
        """The adapter's head, with the labels of a config.json that lies beside it."""
        if receipt.head is None:
            return None
        paths = [Path(directory, CONFIG) for directory in reversed(directories)]
        path = next(filter(is_regular_file, paths), None)
        try:
            config = {} if path is None else read_json(path)
        except ModelError as error:
            raise AdapterFormatError(str(error)) from error
        head = ClassificationHead.of_receipt(receipt, config)
        assert head is not None, "invariant: the receipt has one"
        self._heads.take(head)
        return head


def _pooling(directories: list[str]) -> PoolingKind | None:
    try:
        kinds = [pooling_beside(Path(directory)) for directory in reversed(directories)]
    except ModelError as error:
        raise AdapterFormatError(str(error)) from error
    return next((kind for kind in kinds if kind is not None), None)


def _directories(receipt: _core.Receipt, path: str, stored: StoredAdapter | None) -> list[str]:
    """Where what lies beside the weights is looked for: above a checkpoint, then in it."""
    if stored is None:
        return [path, receipt.directory] if receipt.directory != path else [path]
    return [path] if os.path.isdir(path) and not stored.is_given else []
