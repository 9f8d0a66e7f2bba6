"""load_model: from what a user calls a model to a decoder ready to run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.fingerprint import fingerprint
from loraserve.loader.generation_config import FILE_NAME, read_sampling_defaults
from loraserve.loader.packed_weights import packed_weights
from loraserve.loader.resolve import open_checkpoint
from loraserve.models.config import ModelConfig
from loraserve.models.decoder import Decoder
from loraserve.models.ops import Packer
from loraserve.models.shard import Shard, ShardedWeights
from loraserve.models.weights import BuildDecoder, Tensors, build_decoder, weights_nbytes
from loraserve.pooling.head import ClassificationHead
from loraserve.pooling.params import PoolingKind
from loraserve.pooling.sentence_transformers import pooling_beside
from loraserve.text.tokenizer import Tokenizer
from loraserve.validation.files import expanded, is_regular_file

MAX_LABELS = 2**16


def base_shape(config: ModelConfig, slices: Sequence[_core.AdapterSlice] = ()) -> _core.BaseShape:
    """What adapters of this model are checked against; `slices` are what ranks have of them."""
    tokens = config.vocab_size, config.hidden_size
    return _core.BaseShape(*config.base_shape(), config.biased_modules, tokens, list(slices))


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that belongs to it; `max_model_len` in tokens.

    `fingerprint` says which weights they are (`loader/fingerprint.py`). `sampling_defaults` is what
    `SamplingParams.with_defaults` takes. `quantization` is what matrices are quantised as, as "q4_k" or
    "int8", None where they are dense; `weights_nbytes` what they take. `head` is of a model that classifies,
    `pooling` how it embeds, where its files say so.
    """

    path: Path
    config: ModelConfig
    decoder: Decoder
    tokenizer: Tokenizer
    max_model_len: int
    fingerprint: str
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    quantization: str | None = None
    weights_nbytes: int = 0
    head: ClassificationHead | None = None
    pooling: PoolingKind | None = None

    @property
    def base_shape(self) -> _core.BaseShape:
        """What adapters are checked against."""
        return base_shape(self.config)

    def release(self) -> None:
        """Give up the decoder, which has the weights; what else is known of the model stays."""
        vars(self).pop("decoder", None)


class ChangedWeights(Tensors, Protocol):
    """Weights with the config of what they make."""

    @property
    def config(self) -> ModelConfig:
        """As of the checkpoint, but for biases."""
        ...


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype,
    place: Callable[[ModelConfig, BuildDecoder], tuple[Decoder, int]],
    generation_config: str = "auto",
    change: Callable[[Checkpoint], ChangedWeights] | None = None,
    quantization: str | None = None,
    *,
    keeps_quantized: bool = False,
    shard: Shard | None = None,
) -> LoadedModel:
    """Open, check, read and pack a model.

    Args:
        place: called once the config is checked; builds the decoder where it is to run, and gives it with its
            context in tokens.
        generation_config: `EngineConfig`'s.
        change: gives the weights to take in place of the checkpoint's, with their config.
        quantization: `EngineConfig`'s.
        keeps_quantized: whether the device computes with quantised weights.
        shard: the part to pack here, whose config `place` is then given; `LoadedModel` has the whole's.

    Raises ModelError, and what `place` and `change` raise.
    """
    with open_checkpoint(path_or_id) as checkpoint:
        changed = None if change is None else change(checkpoint)
        config = checkpoint.config if changed is None else changed.config
        weights, kept = packed_weights(checkpoint, changed, quantization, keeps_quantized=keeps_quantized)
        tokenizer = checkpoint.load_tokenizer()
        defaults = _sampling_defaults(checkpoint, generation_config)
        head = _head(checkpoint) if config.is_classifier else None

        own_config = config if shard is None else shard.config_of(config)
        own_weights = weights if shard is None else ShardedWeights(weights, config, shard)

        def build(packer: Packer, num_positions: int) -> Decoder:
            decoder = build_decoder(own_config, own_weights, packer, dtype, num_positions)
            checkpoint.check_all_used()
            return decoder

        nbytes = weights_nbytes(config, weights, dtype.itemsize)
        own_nbytes = weights_nbytes(own_config, own_weights, dtype.itemsize)
        decoder, max_model_len = place(own_config, BuildDecoder(own_nbytes, build, checkpoint.path))
        return LoadedModel(
            checkpoint.path,
            config,
            decoder,
            tokenizer,
            max_model_len,
            fingerprint(checkpoint),
            defaults,
            kept,
            nbytes,
            head,
            pooling_beside(checkpoint.path) if checkpoint.path.is_dir() else None,
        )


def _head(checkpoint: Checkpoint) -> ClassificationHead:
    """What a checkpoint classifies with. Raises ModelError."""
    weight = checkpoint.tensor("score.weight").float()
    hidden_size = checkpoint.config.hidden_size
    if weight.ndim != 2 or weight.shape[1] != hidden_size or not 0 < len(weight) <= MAX_LABELS:
        raise ModelError(
            f"{checkpoint.path}: tensor score.weight has shape {list(weight.shape)}, expected from 1 to "
            f"{MAX_LABELS} labels of {hidden_size} features"
        )
    return ClassificationHead.of_tensors(weight, None, checkpoint.raw_config)


def _sampling_defaults(checkpoint: Checkpoint, generation_config: str) -> dict[str, Any]:
    if generation_config == "none":
        return {}
    if generation_config == "auto":
        return checkpoint.sampling_defaults()
    directory = expanded(generation_config)
    if not is_regular_file(directory / FILE_NAME):
        raise ModelError(
            f"generation_config is {generation_config}, which has no {FILE_NAME}: "
            "give a directory that has one, auto or none"
        )
    return read_sampling_defaults(directory)
