"""Adapter names: which may be given, what each was registered from, and its receipt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from loraserve._core import Receipt
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.text import AdapterText, AddedTokens
from loraserve.errors import AdapterNotFoundError, InvalidRequestError

if TYPE_CHECKING:
    from loraserve.adapters.stored import StoredAdapter
    from loraserve.pooling.head import ClassificationHead

MAX_NAME_CHARS = 256
NAME_PATTERN = re.compile(r"[a-zA-Z0-9_\-.:]+")
RESERVED_NAMES = {
    "__base_model__": "it is LoRAX' name of the base model",
    "_sum": "metrics call sums of adapters so",
    "_other": "metrics call adapters without a label of their own so",
    "_shadow": "metrics call copies of requests so",
    ".": "no URL can name it",
    "..": "no URL can name it",
}


@dataclass(frozen=True)
class WeightsSource:
    """A directory that has an adapter's weights, and the name and receipt it was registered with."""

    """Where an adapter's weights are, and the name and receipt it was registered with.

    `stored` has the weights that are read, None where the PEFT directory at `path` has them.
    """

    name: str
    path: str
    receipt: Receipt
    stored: StoredAdapter | None


@dataclass(frozen=True)
class RegisteredAdapter:
    """One name; several names may share one adapter id, which stands for the content of the weights.

    `text` is how its requests become tokens and its tokens text; `turn` is when it was asked for, among all
    loads; `stored` is as of its `WeightsSource`; `head` is what it classifies with; `generation` is its
    number among those of its name.
    """

    name: str
    path: str
    receipt: Receipt
    adapter_id: int
    manifest: AdapterManifest
    text: AdapterText
    turn: int
    stored: StoredAdapter | None = None
    head: ClassificationHead | None = None
    generation: int = 1

    @cached_property
    def added(self) -> AddedTokens:
        """Its tokens beyond the model's."""
        return AddedTokens.of(self.receipt)


class AdapterRegistry:
    """Names to registered adapters, and adapter ids to the paths they can be read from."""

    def __init__(self) -> None:
        self._by_name: dict[str, RegisteredAdapter] = {}
        self._num_names: Counter[int] = Counter()  # by adapter id
        self._sources: dict[int, dict[str, WeightsSource]] = {}

    def add(self, adapter: RegisteredAdapter) -> None:
        """Bind its name to it, whatever had the name before; its path becomes a source of its content."""
        if adapter.name in self._by_name:
            self.remove(adapter.name)
        self._by_name[adapter.name] = adapter
        self._num_names[adapter.adapter_id] += 1
        alias = adapter.name.partition("@")[0]
        source = WeightsSource(alias, adapter.path, adapter.receipt, adapter.stored)
        self._sources.setdefault(adapter.adapter_id, {})[adapter.path] = source

    def get(self, name: str) -> RegisteredAdapter | None:
        """What has this name, None if nothing has; `remove` raises there."""
        return self._by_name.get(name)

    def adapter_ids(self) -> set[int]:
        """Of everything that has a name."""
        return set(self._num_names)

    def has_name(self, adapter_id: int) -> bool:
        """Whether any name has this content."""
        return adapter_id in self._num_names

    def names(self, adapter_id: int) -> list[str]:
        """All names of this content; those of generations only where there is no other."""
        found = [adapter.name for adapter in self if adapter.adapter_id == adapter_id]
        return [name for name in found if "@" not in name] or found

    def remove(self, name: str) -> RegisteredAdapter:
        """Forget the name; its source is kept for requests still queued. Raises AdapterNotFoundError."""
        if name not in self._by_name:
            raise AdapterNotFoundError(f"adapter {name!r} is not registered")
        adapter = self._by_name.pop(name)
        self._num_names[adapter.adapter_id] -= 1
        if not self._num_names[adapter.adapter_id]:
            del self._num_names[adapter.adapter_id]
        return adapter

    def check_combination(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Raises InvalidRequestError: one of these (name, weight) pairs can't be weighted or summed."""
        active = [(name, weight) for name, weight in adapters if weight != 0.0]
        if not active or (len(active) == 1 and active[0][1] == 1.0):
            return
        for name, weight in active:
            adapter = self.get(name)
            reason = None if adapter is None else adapter.receipt.alone
            if reason is not None:
                what = f"has weight {weight:g}" if len(active) == 1 else f"is one of {len(active)} adapters"
                raise InvalidRequestError(
                    f"adapter {name!r} {what}, but {reason}, which is no delta that could be weighted or "
                    "summed: use it alone with weight 1"
                )

    def forget_sources_except(self, adapter_ids: set[int]) -> None:
        """Drop the sources of all other contents; `sources` may not be asked for them any more."""
        self._sources = {id_: source for id_, source in self._sources.items() if id_ in adapter_ids}

    def sources(self, adapter_id: int) -> list[WeightsSource]:
        """Everywhere this content was registered from, newest first."""
        return list(reversed(self._sources[adapter_id].values()))

    def aliases(self) -> Iterator[RegisteredAdapter]:
        """Those whose names are no generations', in order of registration."""
        return (adapter for adapter in self if "@" not in adapter.name)

    def __iter__(self) -> Iterator[RegisteredAdapter]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)


def registered_name(name: str) -> str:
    """Names have no "/": an adapter of the Hub, `owner/name`, is registered as `owner-name`."""
    return name.replace("/", "-")


def check_adapter_name(name: str, base_names: Sequence[str] = ()) -> None:
    """Whether requests could ask for an adapter of this name, where the base model is called `base_names`.

    Raises:
        InvalidRequestError: it is too long, has other characters than names have, or means something else.
    """
    if len(name) > MAX_NAME_CHARS:
        raise InvalidRequestError(
            f"adapter name {name!r:.40}… has {len(name)} characters, limit is {MAX_NAME_CHARS}"
        )
    if not NAME_PATTERN.fullmatch(name):
        raise InvalidRequestError(
            f"adapter name {name!r} is not allowed, use letters, digits, '_', '-', '.' and ':'"
        )
    if name in RESERVED_NAMES:
        raise InvalidRequestError(
            f"adapter name {name!r} is not allowed: {RESERVED_NAMES[name]}, choose another"
        )
    for base in base_names:
        for written in (base, registered_name(base)):
            if name == written:
                raise InvalidRequestError(
                    f"adapter name {name!r} is the base model's already, choose another "
                    "or give the base model another with --served-model-name"
                )
            if name.startswith(f"{written}:"):
                raise InvalidRequestError(
                    f"adapter name {name!r} means adapter {name[len(written) + 1 :]!r} of base model "
                    f"{written!r} already, choose another"
                )


def check_base_names(names: Sequence[str]) -> None:
    """Whether every name of the base model means it, and nothing else.

    Raises:
        InvalidRequestError: one is empty, given twice, or an adapter of another.
    """
    for index, name in enumerate(names):
        if not name:
            raise InvalidRequestError("a name of the base model is empty, give it at least one character")
        if name in names[:index]:
            raise InvalidRequestError(f"the base model is named {name!r} twice, name it once")
        for other in names:
            if name.startswith(f"{other}:"):
                raise InvalidRequestError(
                    f"base model name {name!r} means adapter {name[len(other) + 1 :]!r} of base model "
                    f"{other!r} already, choose another"
                )
