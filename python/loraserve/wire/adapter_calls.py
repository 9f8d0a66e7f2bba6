"""What both clients do with adapters: load, send, share out, go back, blocking and on asyncio."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from loraserve.v1 import loraserve_pb2 as pb

UPLOAD_PART_NBYTES = 2**20


class AdapterCalls(ABC):
    """Of a blocking client."""

    _stub: Any

    def load_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
        weight: float | None = None,
    ) -> pb.Receipt:
        """Register the PEFT directory `path`, on the server's disk, under `name`.

        With `replace` a name of other content passes over at once: requests accepted before finish on the
        old weights, and on an error the old adapter goes on serving.

        Args:
            name: what requests are to call it.
            path: on the server's disk.
            replace: whether the name may have other content.
            expected_generation: what the name must be at, 0 for not loaded, else GenerationConflictError.
            share: of the name's requests that get it, from 0 to 1, others get what they got; None is all.
            shadow: of the name's requests that are copied to it, which answers none; see `shadow_adapter`.
            weight: from 0.05 to 20, of its share of the engine beside others; None leaves it, or is 1.
        """
        request = pb.LoadAdapterRequest(
            name=name,
            path=path,
            replace=replace,
            expected_generation=expected_generation,
            share=share,
            shadow=shadow,
            weight=weight,
        )
        response: pb.LoadAdapterResponse = self._call(self._stub.LoadAdapter, request)
        return response.receipt

    def upload_adapter(
        self,
        name: str,
        weights: bytes,
        config: Mapping[str, Any],
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
        weight: float | None = None,
    ) -> pb.Receipt:
        """Register an adapter that is sent: the bytes of a safetensors file, 2 GiB at most.

        Args:
            name: what requests are to call it.
            weights: as `safetensors.torch.save` makes them, under the names that PEFT gives tensors.
            config: what adapter_config.json would hold.
            replace, expected_generation, share, shadow, weight: as of `load_adapter`.
        """
        head = _head(name, config, replace, expected_generation, share, shadow, weight)
        parts = _upload(head, weights)
        response: pb.LoadAdapterResponse = self._call(self._stub.UploadAdapter, parts)
        return response.receipt

    def unload_adapter(self, name: str) -> None:
        """Refuse new requests for `name`; running ones finish."""
        self._call(self._stub.UnloadAdapter, pb.UnloadAdapterRequest(name=name))

    def warm_adapter(self, name: str) -> float:
        """Load an adapter into the server's memory ahead of requests; the seconds until it was there."""
        request = pb.WarmAdapterRequest(name=name)
        response: pb.WarmAdapterResponse = self._call(self._stub.WarmAdapter, request)
        return response.load_s

    def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """Keep an adapter in the server's memory, or let it go again."""
        self._call(self._stub.PinAdapter, pb.PinAdapterRequest(name=name, is_pinned=is_pinned))

    def split_adapter(self, name: str, shares: Mapping[int, float]) -> None:
        """Give generations of an adapter shares of its requests, which sum to 1; see `LLM.split_adapter`."""
        self._call(self._stub.SplitAdapter, pb.SplitAdapterRequest(name=name, shares=shares))

    def shadow_adapter(self, name: str, generation: int | None, fraction: float = 0.1) -> None:
        """Have copies of requests run on a generation, None on none; see `LLM.shadow_adapter`."""
        request = pb.ShadowAdapterRequest(name=name, generation=generation, fraction=fraction)
        self._call(self._stub.ShadowAdapter, request)

    def roll_back_adapter(
        self, name: str, generation: int | None = None, *, expected_generation: int | None = None
    ) -> int:
        """Make an earlier generation current, and its number; see `LLM.roll_back_adapter`."""
        request = pb.RollBackAdapterRequest(
            name=name, generation=generation, expected_generation=expected_generation
        )
        response: pb.RollBackAdapterResponse = self._call(self._stub.RollBackAdapter, request)
        return response.generation

    def generations(self, name: str) -> list[pb.Generation]:
        """What was published under an adapter's name, oldest first, and which requests get which."""
        request = pb.ListGenerationsRequest(name=name)
        response: pb.ListGenerationsResponse = self._call(self._stub.ListGenerations, request)
        return list(response.generations)

    def adapters(self) -> list[pb.Adapter]:
        """All registered adapters, sorted by name."""
        response: pb.ListAdaptersResponse = self._call(self._stub.ListAdapters, pb.ListAdaptersRequest())
        return list(response.adapters)

    @abstractmethod
    def _call(self, method: Any, request: Any) -> Any:
        """The server's answer, or its typed error."""


class AsyncAdapterCalls(ABC):
    """Of an asyncio client."""

    _stub: Any

    async def load_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
        weight: float | None = None,
    ) -> pb.Receipt:
        """As `Client.load_adapter`."""
        request = pb.LoadAdapterRequest(
            name=name,
            path=path,
            replace=replace,
            expected_generation=expected_generation,
            share=share,
            shadow=shadow,
            weight=weight,
        )
        response: pb.LoadAdapterResponse = await self._call(self._stub.LoadAdapter, request)
        return response.receipt

    async def upload_adapter(
        self,
        name: str,
        weights: bytes,
        config: Mapping[str, Any],
        *,
        replace: bool = False,
        expected_generation: int | None = None,
        share: float | None = None,
        shadow: float | None = None,
        weight: float | None = None,
    ) -> pb.Receipt:
        """As `Client.upload_adapter`."""
        head = _head(name, config, replace, expected_generation, share, shadow, weight)
        parts = _upload(head, weights)
        response: pb.LoadAdapterResponse = await self._call(self._stub.UploadAdapter, parts)
        return response.receipt

    async def unload_adapter(self, name: str) -> None:
        """As `Client.unload_adapter`."""
        await self._call(self._stub.UnloadAdapter, pb.UnloadAdapterRequest(name=name))

    async def warm_adapter(self, name: str) -> float:
        """As `Client.warm_adapter`."""
        request = pb.WarmAdapterRequest(name=name)
        response: pb.WarmAdapterResponse = await self._call(self._stub.WarmAdapter, request)
        return response.load_s

    async def pin_adapter(self, name: str, is_pinned: bool = True) -> None:
        """As `Client.pin_adapter`."""
        await self._call(self._stub.PinAdapter, pb.PinAdapterRequest(name=name, is_pinned=is_pinned))

    async def split_adapter(self, name: str, shares: Mapping[int, float]) -> None:
        """As `Client.split_adapter`."""
        await self._call(self._stub.SplitAdapter, pb.SplitAdapterRequest(name=name, shares=shares))

    async def shadow_adapter(self, name: str, generation: int | None, fraction: float = 0.1) -> None:
        """As `Client.shadow_adapter`."""
        request = pb.ShadowAdapterRequest(name=name, generation=generation, fraction=fraction)
        await self._call(self._stub.ShadowAdapter, request)

    async def roll_back_adapter(
        self, name: str, generation: int | None = None, *, expected_generation: int | None = None
    ) -> int:
        """As `Client.roll_back_adapter`."""
        request = pb.RollBackAdapterRequest(
            name=name, generation=generation, expected_generation=expected_generation
        )
        response: pb.RollBackAdapterResponse = await self._call(self._stub.RollBackAdapter, request)
        return response.generation

    async def generations(self, name: str) -> list[pb.Generation]:
        """As `Client.generations`."""
        request = pb.ListGenerationsRequest(name=name)
        response: pb.ListGenerationsResponse = await self._call(self._stub.ListGenerations, request)
        return list(response.generations)

    async def adapters(self) -> list[pb.Adapter]:
        """As `Client.adapters`."""
        response: pb.ListAdaptersResponse = await self._call(
            self._stub.ListAdapters, pb.ListAdaptersRequest()
        )
        return list(response.adapters)

    @abstractmethod
    async def _call(self, method: Any, request: Any) -> Any:
        """The server's answer, or its typed error."""


def _head(
    name: str,
    config: Mapping[str, Any],
    replace: bool,
    expected_generation: int | None,
    share: float | None,
    shadow: float | None,
    weight: float | None,
) -> pb.UploadAdapterHead:
    return pb.UploadAdapterHead(
        name=name,
        config_json=json.dumps(dict(config)),
        replace=replace,
        expected_generation=expected_generation,
        share=share,
        shadow=shadow,
        weight=weight,
    )


def _upload(head: pb.UploadAdapterHead, weights: bytes) -> Iterator[pb.UploadAdapterRequest]:
    yield pb.UploadAdapterRequest(head=head)
    for start in range(0, len(weights), UPLOAD_PART_NBYTES):
        yield pb.UploadAdapterRequest(data=weights[start : start + UPLOAD_PART_NBYTES])
