"""Checkpoint: an open model on disk; config, named tensors and tokenizer, whatever the file format."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.models.config import ModelConfig
from loraserve.models.quantized import QuantFormat
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

    @property
    @abstractmethod
    def quantization(self) -> str | None:
        """How its matrices are quantised, as "q4_k" or "gptq"; None where they are floats."""

    @property
    @abstractmethod
    def quantization_method(self) -> str | None:
        """The format of files that says how they are quantised, as "gguf" or "gptq"; None has none."""

    def quant_format(self, name: str, _shape: tuple[int, int] | None = None) -> QuantFormat | None:
        """How it is quantised; None where it is not, is missing or can't be kept so. Raises ModelError."""
        return self._quant_format(name) if name in self.names() else None

    @abstractmethod
    def _quant_format(self, name: str) -> QuantFormat | None:
        """`quant_format` of a tensor listed in `names()`."""

    @abstractmethod
    def _file_of(self, name: str) -> Path:
        """The file that holds a tensor listed in `names()`."""

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Read a tensor listed in `names()`. Raises ModelError."""

    @abstractmethod
    def _read_quantized(self, name: str) -> _core.QuantizedWeight:
        """Read a tensor that has a `quant_format`. Raises ModelError, ValueError."""

    @abstractmethod
    def _read_row(self, name: str, index: int) -> Tensor:
        """Read a row that a matrix listed in `names()` has, and no more. Raises ModelError."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor listed in `names()`, without reading it. Raises ModelError."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Those that hold the tensors."""

    def skip(self, name: str) -> None:
        """Take a tensor listed in `names()` as read: what it holds is known from elsewhere."""
        self._used.add(name)

    def has(self, name: str) -> bool:
        """Whether `names()` has it."""
        return name in self.names()

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Read one float tensor. Raises ModelError naming file and tensor if missing or not of `shape`."""
        if name not in self.names():
            raise ModelError(f"{self.path}: tensor {name} is missing")
        tensor = self._checked(name, self._read(name))
        self._used.add(name)
        if shape is not None:
            self._check_shape(name, tuple(tensor.shape), shape)
        return tensor

    def quantized(self, name: str, shape: tuple[int, int]) -> _core.QuantizedWeight:
        """Read one matrix that has a `quant_format`, as it is. Raises ModelError naming file and tensor."""
        self._check_shape(name, self.shape(name), shape)
        try:
            weight = self._read_quantized(name)
        except ModelError:
            raise
        except ValueError as error:
            raise ModelError(f"{self._file_of(name)}: tensor {name} can't be read: {error}") from error
        self._used.add(name)
        return weight

    def row(self, name: str, index: int) -> Tensor:
        """Row `index` of a matrix, or all of a vector, of those `names()` lists. Raises ModelError."""
        is_matrix = len(self.shape(name)) == 2 and index < self.shape(name)[0]
        return self._checked(name, self._read_row(name, index) if is_matrix else self._read(name))

    def _check_shape(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            where = f"{self._file_of(name)}: tensor {name}"
            raise ModelError(f"{where} has shape {list(shape)}, expected {list(expected)}")

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{self._file_of(name)}: tensor {name} has dtype {tensor.dtype}, expected float32, bfloat16 "
                "or float16, or a quantization_config in config.json that says how it is quantised"
            )
        return tensor

    def check_all_used(self) -> None:
        """A tensor nobody asked for means the model is not what its config says. Raises ModelError."""
        unused = sorted(
            name
            for name in set(self.names()) - self._used
            if not name.endswith(IGNORED_SUFFIXES) and not self._adds_nothing(name)
        )
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise ModelError(
                f"{self._file_of(unused[0])}: tensor {unused[0]}{more} has no place in "
                f"{self.config.architecture} as configured"
            )

    def _adds_nothing(self, name: str) -> bool:
        """Whether it is a bias of zeros, as GPTQ's writers leave beside every weight that they quantise."""
        return self.quantization == "gptq" and name.endswith(".bias") and not self._read(name).any()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
