"""Checkpoint: an open model on disk; config, named tensors and tokenizer, whatever the file format."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loraserve.errors import ModelError
from loraserve.models.config import ModelConfig
from loraserve.text.tokenizer import Tokenizer

# Tables older files carry; the decoder computes its own.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", "rope_freqs.weight")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Checkpoint(ABC):
    """Tensors go by their Hugging Face names; `raw_config` is in the terms of config.json.

    `rope_factors` divide the rotary frequencies; config.json has no word for them. Raises ModelError: the
    files can't be read, or the decoder can't follow the config.
    """

    def __init__(self, path: Path, raw_config: dict[str, Any], rope_factors: Sequence[float] = ()) -> None:
        self.path = path
        self.raw_config = raw_config
        self._used: set[str] = set()
        try:
            self.config = ModelConfig.from_hf(raw_config, rope_factors)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None

    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of all tensors."""

    @abstractmethod
    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model. Raises ModelError."""

    @abstractmethod
    def sampling_defaults(self) -> dict[str, Any]:
        """What `SamplingParams.with_defaults` takes of what the model says of sampling. Raises ModelError."""

    @abstractmethod
    def close(self) -> None:
        """Release the files; tensors already read stay valid."""

    @abstractmethod
    def _file_of(self, name: str) -> Path:
        """The file that holds a tensor listed in `names()`."""

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Read a tensor listed in `names()`. Raises ModelError."""

    @abstractmethod
    def _read_row(self, name: str, index: int) -> Tensor:
        """Read a row that a matrix listed in `names()` has, and no more. Raises ModelError."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor listed in `names()`, without reading it. Raises ModelError."""

    def has(self, name: str) -> bool:
        """Whether `names()` has it."""
        return name in self.names()

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read one float tensor. Raises ModelError naming file and tensor if missing or not of `shape`."""
        if name not in self.names():
            raise ModelError(f"{self.path}: tensor {name} is missing")
        tensor = self._checked(name, self._read(name))
        self._used.add(name)
        if shape is not None and tuple(tensor.shape) != shape:
            where = f"{self._file_of(name)}: tensor {name}"
            raise ModelError(f"{where} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def row(self, name: str, index: int) -> Tensor:
        """Row `index` of a matrix, or all of a vector, of those `names()` lists. Raises ModelError."""
        is_matrix = len(self.shape(name)) == 2 and index < self.shape(name)[0]
        return self._checked(name, self._read_row(name, index) if is_matrix else self._read(name))

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{self._file_of(name)}: tensor {name} has dtype {tensor.dtype}, expected float32, bfloat16 "
                "or float16: quantised weights are read from .gguf files only"
            )
        return tensor

    def check_all_used(self) -> None:
        """A tensor nobody asked for means the model is not what its config says. Raises ModelError."""
        unused = sorted(
            name for name in set(self.names()) - self._used if not name.endswith(IGNORED_SUFFIXES)
        )
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise ModelError(
                f"{self._file_of(unused[0])}: tensor {unused[0]}{more} has no place in "
                f"{self.config.architecture} as configured"
            )

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
