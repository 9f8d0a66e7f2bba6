"""`AdapterCheck`: adapters on disk, compared with all of one base model."""

from __future__ import annotations

from pathlib import Path

from loraserve import _core
from loraserve.adapters.beside import BesideCheck
from loraserve.loader.base_weights import BaseWeights
from loraserve.loader.checkpoint import Checkpoint
from loraserve.text.tokenizer import Tokenizer


def open_check(checkpoint: Checkpoint, dtype: str, max_lora_rank: int) -> AdapterCheck:
    """The check against a model that is not loaded. Raises ModelError."""
    shape = _core.BaseShape(*checkpoint.config.base_shape())
    return AdapterCheck(shape, dtype, max_lora_rank, checkpoint.path, checkpoint.load_tokenizer())


class AdapterCheck:
    """Checks adapters; safe to use from several threads.

    Args:
        shape: the base model's modules.
        dtype: in which weights are stored.
        max_lora_rank: adapters of a higher rank are refused.
        model: the base model's directory or .gguf file.
        tokenizer: the base model's.
    """

    def __init__(
        self, shape: _core.BaseShape, dtype: str, max_lora_rank: int, model: Path, tokenizer: Tokenizer
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.max_lora_rank = max_lora_rank
        self._base_weights = BaseWeights(model, dtype)
        self._beside = BesideCheck(model, tokenizer)

    def check_weights(self, path: str, pace: _core.LoadPace | None = None) -> _core.Receipt:
        """Read and check what is applied. Raises AdapterFormatError."""
        return _core.check_adapter(path, self.shape, self.dtype, self.max_lora_rank, pace, self._base_weights)

    def check(self, path: str, pace: _core.LoadPace | None = None) -> _core.Receipt:
        """`check_weights`, and what lies beside the weights and is not used. Raises AdapterFormatError."""
        receipt = self.check_weights(path, pace)
        return receipt.with_beside([], self._beside.find_unused(receipt.directory))
