"""load_model: from what a user calls a model to a decoder ready to run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from loraserve import _core
from loraserve.loader.resolve import open_checkpoint
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.weights import build_decoder
from loraserve.ops.base import Ops
from loraserve.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that belongs to it; `max_model_len` in tokens."""

    path: Path
    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer
    max_model_len: int

    @property
    def base_shape(self) -> _core.BaseShape:
        """What adapters are checked against."""
        return _core.BaseShape(*self.decoder.base_shape())

    def release(self) -> None:
        """Give up the decoder, which has the weights; what else is known of the model stays."""
        vars(self).pop("decoder", None)


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype,
    ops_factory: Callable[[ModelConfig], Ops],
    max_model_len: int | None = None,
) -> LoadedModel:
    """Open, check, read and pack a model; `ops_factory` is called once the config is checked.

    Raises ModelError.
    """
    with open_checkpoint(path_or_id) as checkpoint:
        config = checkpoint.config
        max_model_len = config.resolve_max_model_len(max_model_len)
        tokenizer = checkpoint.load_tokenizer()
        decoder = build_decoder(config, checkpoint, ops_factory(config), dtype, max_model_len)
        checkpoint.check_all_used()
        return LoadedModel(checkpoint.path, config, decoder, tokenizer, max_model_len)
