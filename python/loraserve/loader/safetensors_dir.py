"""A Hugging Face model directory: config.json, tokenizer files, one or several safetensors files."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraserve import _core
from loraserve.errors import ModelError
from loraserve.loader.checkpoint import Checkpoint
from loraserve.loader.generation_config import read_sampling_defaults
from loraserve.loader.quantized.config import quantized_linears
from loraserve.loader.quantized.levels import QuantizedLinears, quant_format
from loraserve.models.quantized import QuantFormat
from loraserve.text.tokenizer import Tokenizer
from loraserve.validation.files import is_regular_file
from loraserve.validation.json_file import read_json, read_optional_json
from loraserve.validation.not_a_model import without_config, without_weights

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


class SafetensorsDir(Checkpoint):
    """Shards are memory-mapped; a tensor is read from disk when it is asked for.

    What files hold of a quantised linear goes by the name that its weight would have.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_config(path))
        self._stored = _StoredTensors(path)
        try:
            self._linears = self._quantized_linears()
            modules = {name: self._module_of(name) for name in self._stored.shard_of}
            weights = {f"{module}.weight" for module in modules.values() if module is not None}
            for name, module in modules.items():
                if module is None and name in weights:
                    raise self._stored.error(name, "is there twice, once quantised")
        except BaseException:
            self.close()
            raise
        self._formats: dict[str, QuantFormat | None] = {}  # of those asked for
        # The module of each name whose weight is quantised, None of the others.
        self._modules = {
            name if module is None else f"{module}.weight": module for name, module in modules.items()
        }

    def names(self) -> Collection[str]:
        return self._modules.keys()

    @property
    def quantization(self) -> str | None:
        if self._linears is None or not any(self._modules.values()):
            return None
        return self._linears.method

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path)

    def sampling_defaults(self) -> dict[str, Any]:
        return read_sampling_defaults(self.path)

    def close(self) -> None:
        self._modules = {}
        self._stored.close()

    @property
    def quantization_method(self) -> str | None:
        return None if self._linears is None else self._linears.method

    def _quant_format(self, name: str) -> QuantFormat | None:
        module = self._modules[name]
        if self._linears is None or module is None:
            return None
        if name not in self._formats:
            self._formats[name] = quant_format(self._linears, module)
        return self._formats[name]

    def _quantized_linears(self) -> QuantizedLinears | None:
        try:
            return quantized_linears(self.raw_config, self._stored)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from None

    def _module_of(self, name: str) -> str | None:
        return None if self._linears is None else self._linears.module_of(name)

    def files(self) -> list[Path]:
        return sorted(set(self._stored.shard_of.values()))

    def _file_of(self, name: str) -> Path:
        module = self._modules[name]
        if module is None:
            return self._stored.shard_of[name]
        return next(
            file for stored, file in self._stored.shard_of.items() if self._module_of(stored) == module
        )

    def shape(self, name: str) -> tuple[int, ...]:
        module = self._modules[name]
        if self._linears is None or module is None:
            return self._stored.shape(name)
        return self._linears.shape(module)

    def _read(self, name: str) -> Tensor:
        module = self._modules[name]
        if self._linears is None or module is None:
            return self._stored.read(name)
        return self._linears.levels(module).dequantized()

    def _read_quantized(self, name: str) -> _core.QuantizedWeight:
        module = self._modules[name]
        assert self._linears is not None, "invariant: it has a format"
        assert module is not None, "invariant: it has a format"
        return self._linears.levels(module).quantized()

    def _read_row(self, name: str, index: int) -> Tensor:
        module = self._modules[name]
        if self._linears is None or module is None:
            return self._stored.read(name, slice(index, index + 1))[0]
        return self._linears.levels(module, range(index, index + 1)).dequantized()[0]


class _StoredTensors:
    """The tensors of all shards by their own names: `Stored`."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        try:
            self._shards = {file: self._open(file) for file in shard_files(path)}
            self.shard_of = {name: file for file, shard in self._shards.items() for name in shard.keys()}  # noqa: SIM118
            self._check_index(path)
        except BaseException:
            self.close()
            raise

    def has(self, name: str) -> bool:
        return name in self.shard_of

    def shape(self, name: str) -> tuple[int, ...]:
        with self._readable(name) as shard:
            return tuple(shard.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> Tensor:
        with self._readable(name) as shard:
            if columns is None and rows == slice(None):
                tensor: Tensor = shard.get_tensor(name)
            else:
                part = shard.get_slice(name)
                tensor = part[rows] if columns is None else part[rows, columns]
        return tensor

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.shard_of[name]}: tensor {name} {problem}")

    def close(self) -> None:
        self._shards, self.shard_of = {}, {}
        self._stack.close()

    @contextmanager
    def _readable(self, name: str) -> Iterator[Any]:
        file = self.shard_of[name]
        try:
            yield self._shards[file]
        except SafetensorError as error:
            raise ModelError(f"{file}: tensor {name} can't be read: {error}") from error

    def _open(self, file: Path) -> Any:
        if not is_regular_file(file):
            raise ModelError(f"{file} is missing")
        try:
            return self._stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            foreign = _core.recognise_file(str(file))
            if foreign is not None:
                raise ModelError(f"{file} is {foreign}") from None
            raise ModelError(f"{file} is truncated or malformed: {error}") from error

    def _check_index(self, path: Path) -> None:
        for name, file in _index(path).items():
            if self.shard_of.get(name) != file:
                raise ModelError(f"{file}: tensor {name} is missing, {INDEX_FILE} places it there")


def read_config(path: Path) -> dict[str, Any]:
    """config.json, with the stop tokens of generation_config.json if it names any. Raises ModelError."""
    if not (path / "config.json").exists():
        raise ModelError(f"{path / 'config.json'} is missing: {without_config(path)}")
    config = read_json(path / "config.json")
    if (path / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{path} holds {ADAPTER_CONFIG} beside config.json, which transformers would apply: "
            "move the adapter to a directory of its own and load it by name, or remove it"
        )
    generation = read_optional_json(path / "generation_config.json")
    if generation.get("eos_token_id") is not None:
        config["eos_token_id"] = generation["eos_token_id"]
    return config


def shard_files(path: Path) -> list[Path]:
    """The weight files of a directory. Raises ModelError if it has none we read."""
    if (path / INDEX_FILE).exists():
        return sorted(set(_index(path).values()))
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    raise ModelError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}: {without_weights(path)}")


def _index(path: Path) -> dict[str, Path]:
    """Tensor name to file; names in the index may not leave the directory."""
    index = path / INDEX_FILE
    if not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index} places tensor {name} in {file!r}, expected a file name")
    return {name: path / file for name, file in weight_map.items()}
