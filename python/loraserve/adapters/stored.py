"""Adapters that lie in no PEFT directory: in files without a name, which go with the last who holds them.

Weights are read at registration and again at each load, so what is given as tensors or converted is written
to a file in the directory for temporary ones (TMPDIR). It is nobody else's to open, and is gone with the
process, however that ends.
"""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

from loraserve.errors import CapacityError, InvalidRequestError

if TYPE_CHECKING:
    from torch import Tensor

MAX_STORED_NBYTES: Final = 8 * 2**30  # of all adapters of an engine
MAX_ADAPTER_NBYTES: Final = 2 * 2**30  # of one
MAX_CONFIG_NBYTES: Final = 2**20  # as of an adapter_config.json
MAX_TENSORS: Final = 2**16


class StoredAdapter:
    """One adapter in a file of the store; what the file takes is given back with the last reference.

    Args:
        source: where it came from, for people.
        config: the text of its adapter_config.json.
        notes: what was understood in converting it; None where it was given as it is.
    """

    def __init__(
        self, file: _PrivateFile, source: str, config: str, notes: Sequence[str] | None = None
    ) -> None:
        self._file = file
        self.source = source
        self.config = config
        self.is_given = notes is None
        self.notes = tuple(notes or ())

    @property
    def files(self) -> tuple[str, str]:
        """The config's text and a path of the weights, as `_core` takes them; keep this object meanwhile."""
        return self.config, self._file.path

    def discard(self) -> None:
        """Give the room back at once, of what nobody will serve: an error's frames may hold it for long."""
        self._file.close()


class AdapterStore:
    """Makes stored adapters, within `max_nbytes` of all that are referred to; safe to use from threads."""

    def __init__(
        self, max_nbytes: int = MAX_STORED_NBYTES, max_adapter_nbytes: int = MAX_ADAPTER_NBYTES
    ) -> None:
        self.max_adapter_nbytes = max_adapter_nbytes
        self._max_nbytes = max_nbytes
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What is taken now."""
        return self._nbytes

    def put(
        self,
        source: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        notes: Sequence[str] | None = None,
    ) -> StoredAdapter:
        """Write tensors as safetensors.

        Raises:
            InvalidRequestError: config or tensors are none.
            CapacityError: there is no room.
        """
        text = config_text(config)
        upload = self.begin(source)
        for part in _safetensors(_plain(tensors)):
            upload.write(part)
        return upload.finish(text, notes)

    def begin(self, source: str) -> Upload:
        """An adapter whose bytes are to come. Raises CapacityError: no file can be made."""
        return Upload(self, source)

    def _take(self, source: str, taken: list[int], more: int) -> None:
        """Adds to what a file has taken."""
        if taken[0] + more > self.max_adapter_nbytes:
            raise CapacityError(
                f"{source} has more than {self.max_adapter_nbytes} bytes, the limit of an adapter given as "
                "tensors or bytes: put it into a directory and load that"
            )
        with self._lock:
            if self._nbytes + more > self._max_nbytes:
                raise CapacityError(
                    f"adapters given as tensors or bytes take {self._nbytes} of {self._max_nbytes} bytes, "
                    f"and {source} does not fit: unload some, or load directories"
                )
            self._nbytes += more
            taken[0] += more

    def _give_back(self, taken: list[int]) -> None:
        with self._lock:
            self._nbytes -= taken[0]


class _PrivateFile:
    """An open file without a name; closed, and its room given back, with the last reference."""

    def __init__(self, store: AdapterStore, source: str) -> None:
        with _disk_errors(source):
            file = tempfile.TemporaryFile(prefix="loraserve-", buffering=0)  # noqa: SIM115  closed below
        self._store = store
        self._source = source
        self._file = file
        self._taken = [0]
        self.close = weakref.finalize(self, _discard, store, file, self._taken)

    @property
    def path(self) -> str:
        """Opens the file anew, while this object is kept."""
        return f"/proc/self/fd/{self._file.fileno()}"

    def write(self, data: Any) -> None:
        """Append the bytes of a buffer. Raises CapacityError."""
        view = memoryview(data).cast("B")
        self._store._take(self._source, self._taken, view.nbytes)
        with _disk_errors(self._source):
            while view:
                view = view[self._file.write(view) :]


def _discard(store: AdapterStore, file: IO[bytes], taken: list[int]) -> None:
    file.close()
    store._give_back(taken)


class Upload:
    """Bytes of one adapter on their way into the store; `finish` it, or drop it."""

    def __init__(self, store: AdapterStore, source: str) -> None:
        self._file = _PrivateFile(store, source)
        self._source = source

    def write(self, data: Any) -> None:
        """Append bytes of a safetensors file. Raises CapacityError."""
        self._file.write(data)

    def finish(self, config: str, notes: Sequence[str] | None = None) -> StoredAdapter:
        """The adapter, whose bytes are all there."""
        return StoredAdapter(self._file, self._source, config, notes)

    def discard(self) -> None:
        """Give the room back at once."""
        self._file.close()


def memory_source(name: str) -> str:
    """What the path of an adapter given as tensors or bytes is called."""
    return f"memory:{name}"


def config_text(config: Mapping[str, Any] | str) -> str:
    """A config as text of JSON. Raises InvalidRequestError: it is no object, or too long."""
    try:
        text = config if isinstance(config, str) else json.dumps(dict(config), default=_listed)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"config is no JSON object: {error}; give what adapter_config.json would hold"
        ) from None
    if len(text.encode(errors="replace")) > MAX_CONFIG_NBYTES:
        raise InvalidRequestError(f"config has {len(text)} characters, limit is {MAX_CONFIG_NBYTES}")
    return text


def _listed(value: Any) -> Any:
    """PEFT's LoraConfig holds sets and enums."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors on the CPU, contiguous."""
    import torch  # noqa: PLC0415  slow to import

    if not isinstance(tensors, Mapping) or not tensors:
        raise InvalidRequestError("tensors are no mapping of names to tensors, give at least one")
    if len(tensors) > MAX_TENSORS:
        raise InvalidRequestError(f"there are {len(tensors)} tensors, limit is {MAX_TENSORS}")
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InvalidRequestError(
                f"tensors has {name!r:.100}: {type(tensor).__name__}, expected a name and a torch tensor"
            )
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise InvalidRequestError(f"tensor {name!r:.100} has no plain values, give a dense one")
        plain[name] = tensor.detach().to("cpu").contiguous()
    return plain


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The content of a safetensors file, a tensor at a time; the library makes all of it at once."""
    import torch  # noqa: PLC0415

    kinds = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
    }
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise InvalidRequestError(
                f"tensor {name!r:.100} has dtype {tensor.dtype}, give float32, float16 or bfloat16"
            )
        place = [end, end + tensor.nbytes]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.nbytes:
            yield tensor.reshape(-1).view(torch.uint8).numpy()


@contextmanager
def _disk_errors(source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = tempfile.gettempdir()
        raise CapacityError(f"{source} can't be kept in {where} (TMPDIR): {error}") from error
