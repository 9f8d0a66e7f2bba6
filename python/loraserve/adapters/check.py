"""`AdapterCheck`: adapters on disk, compared with all of one base model."""

from __future__ import annotations

from dataclasses import dataclass

from loraserve import _core
from loraserve.adapters.beside import BesideReader, has_files
from loraserve.adapters.manifest import AdapterManifest, read_manifest
from loraserve.adapters.text import AdapterText
from loraserve.loader.base_weights import BaseWeights
from loraserve.loader.checkpoint import Checkpoint


@dataclass(frozen=True)
class CheckedFiles:
    """All of an adapter's directory: its weights' receipt, its manifest, and what holds for its requests."""

    receipt: _core.Receipt
    manifest: AdapterManifest
    text: AdapterText

    def try_chat(self) -> None:
        """Try out what the manifest asks of chats. Raises InvalidRequestError."""
        tokenizer = self.text.tokenizer
        if self.manifest.chat_template is not None and tokenizer.chat_template is not None:
            tokenizer.chat_template.check()
        if self.manifest.system_prompt is not None:
            tokenizer.apply_chat_template(
                self.manifest.with_system_prompt([{"role": "user", "content": "hello"}])
            )


def open_check(checkpoint: Checkpoint, dtype: str, max_lora_rank: int) -> AdapterCheck:
    """The check against a model that is not loaded. Raises ModelError."""
    beside = BesideReader(
        checkpoint.path,
        checkpoint.load_tokenizer(),
        checkpoint.config.vocab_size,
        checkpoint.sampling_defaults(),
    )
    shape = _core.BaseShape(*checkpoint.config.base_shape(), checkpoint.config.biased_modules)
    return AdapterCheck(shape, dtype, max_lora_rank, BaseWeights(checkpoint.path, dtype), beside)


class AdapterCheck:
    """Checks adapters; safe to use from several threads.

    Args:
        shape: the base model's modules.
        dtype: in which weights are stored.
        max_lora_rank: adapters of a higher rank are refused.
        base_weights: the base model's, to compare copies with.
        beside: reads what lies beside the weights.
    """

    def __init__(
        self,
        shape: _core.BaseShape,
        dtype: str,
        max_lora_rank: int,
        base_weights: BaseWeights,
        beside: BesideReader,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.max_lora_rank = max_lora_rank
        self._base_weights = base_weights
        self._beside = beside

    def check_weights(self, path: str, pace: _core.LoadPace | None = None) -> _core.Receipt:
        """Read and check what is applied. Raises AdapterFormatError."""
        return _core.check_adapter(path, self.shape, self.dtype, self.max_lora_rank, pace, self._base_weights)

    def check(
        self, path: str, pace: _core.LoadPace | None = None, manifest: AdapterManifest | None = None
    ) -> CheckedFiles:
        """The weights and all that lies beside them; `manifest` goes over the directory's own.

        Raises:
            AdapterFormatError: something of it can't be read, or can't be used with this model.
            CapacityError, OverloadedError: as of `BesideReader.read`.
        """
        receipt = self.check_weights(path, pace)
        own = read_manifest(path) or read_manifest(receipt.directory)
        manifest = (manifest or AdapterManifest()).merged_over(own)
        beside = (
            receipt.directory if has_files(receipt.directory) else path
        )  # of a checkpoint below, or above
        text = self._beside.read(beside, manifest.chat_template)
        return CheckedFiles(receipt.with_beside(list(text.notes), list(text.not_used)), manifest, text)
