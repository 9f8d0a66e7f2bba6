"""`RequestAdapters`: what the adapters of a request mean when it is submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraserve.adapters.registry import AdapterRegistry, RegisteredAdapter
from loraserve.adapters.text import NO_TOKENS, AddedTokens
from loraserve.engine.merged import Merged
from loraserve.errors import AdapterUnavailableError


class AdapterReplacedError(AdapterUnavailableError):
    """A request was prepared for what the name of an adapter meant before: prepare it again."""


class RequestAdapters:
    """For the engine, under its lock.

    Args:
        registry: what names mean.

    `merged` is the adapter in the model's weights, once there is one.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        self.merged: Merged | None = None
        self._registry = registry

    def check_registered(self, registered: Mapping[str, RegisteredAdapter | None]) -> None:
        """Whether these names still mean this.

        Raises AdapterReplacedError.
        """
        for name, adapter in registered.items():
            if self._registry.get(name) is not adapter:
                raise AdapterReplacedError(
                    f"adapter {name!r} was loaded, replaced or unloaded while the request was prepared: "
                    "send it again"
                )

    def check_combination(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Whether these (name, weight) pairs may be used together.

        Raises:
            InvalidRequestError: one can't be weighted or summed with others.
        """
        if self.merged is not None:
            self.merged.check_combination(adapters)
        self._registry.check_combination(adapters)

    def to_apply(self, adapters: Sequence[tuple[str, float]]) -> Sequence[tuple[str, float]]:
        """Those that the scheduler has to bring into a sequence; what is in the weights already is none."""
        merged = None if self.merged is None else self.merged.name
        return [(name, weight) for name, weight in adapters if name != merged]

    def added_tokens(self, adapters: Sequence[tuple[str, float]]) -> AddedTokens:
        """Tokens beyond the model's for these (name, weight) pairs, which may be used together."""
        for name, weight in adapters:
            adapter = self._registry.get(name)
            if adapter is not None and weight != 0.0 and adapter.added.known:
                return adapter.added
        return NO_TOKENS
