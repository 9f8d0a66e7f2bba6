"""Replicas without engines and a handle without Ray: they answer with words, refuse, hang and die at will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from loraserve.engine.name_history import NameHistory, Published
from loraserve.errors import AdapterFormatError, InvalidRequestError, LoraserveError
from loraserve.ray.link import Link
from loraserve.ray.values import (
    Accepted,
    AdapterRecord,
    Catalog,
    Entry,
    FleetState,
    LinkedEvents,
    NotPreparedError,
    PreparedReply,
    Publication,
    Pulse,
)
from loraserve.request import Delta, GenerateRequest, Usage

from tests.server.control_server import RECEIPT, ControlEngine


class DiedError(Exception):
    """What Ray says of an actor that has died."""


class FakeReplica:
    """Answers with the words of the prompt; `stop_after` words it waits for `go_on`.

    Args:
        name: its id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.died = asyncio.Event()
        self.go_on = asyncio.Event()
        self.stop_after: int | None = None
        self.refuses: dict[str, LoraserveError] = {}  # by method
        self.hangs: set[str] = set()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.adapters: dict[str, list[str]] = {}  # paths of its generations; the last is current
        self.prepared: dict[str, GenerateRequest] = {}
        self.aborted: list[str] = []
        self._checked: dict[str, tuple[str, str]] = {}
        self._link = Link()

    def die(self) -> None:
        self.died.set()

    async def identify(self) -> str:
        return self.name

    async def prepare(self, _: Any, ticket: str, request: GenerateRequest) -> Any:
        self.prepared[ticket] = request
        return PreparedReply(
            replica=self.name,
            prompt_token_ids=[1, 2],
            params=request.params,
            registered={},
            generations={},
            num_sequences=1,
            tokenizer_of=None,
        )

    async def generate(self, _: Any, __: str, ticket: str, max_tokens: int | None) -> None:
        request = self.prepared.pop(ticket, None)
        if request is None:
            raise NotPreparedError(ticket)
        self._link.put(ticket, Accepted({}, None))
        deltas = []
        for index, word in enumerate(str(request.prompt).split()):
            if index == self.stop_after:
                await self.go_on.wait()
            deltas.append(Delta(0, f"{word} of {self.name} ", [index], None, None, None))
            if not request.is_read_whole:
                self._link.put(ticket, deltas[-1])
        deltas.append(Delta(0, "", [], None, "stop", Usage(2, 1, 0)))
        self._link.put(ticket, deltas if request.is_read_whole else deltas[-1])

    async def abort(self, _: Any, ticket: str) -> None:
        self.aborted.append(ticket)

    async def link(self, _: Any, __: str) -> AsyncIterator[LinkedEvents]:
        self._link = Link()
        messages = self._link.messages()
        while True:
            following = asyncio.ensure_future(anext(messages))
            dying = asyncio.ensure_future(self.died.wait())
            done, _ = await asyncio.wait({following, dying}, return_when=asyncio.FIRST_COMPLETED)
            dying.cancel()
            if following not in done:
                following.cancel()
                raise DiedError(f"{self.name} has died")
            yield following.result()

    async def pulse(self, _: Any, __: str) -> Pulse:
        engine = ControlEngine(*self.adapters)
        return Pulse(
            replica=self.name,
            info=replace(engine.info(), num_adapters=len(self.adapters)),
            stats=replace(engine.stats(), adapters={}, num_adapters=len(self.adapters)),
            resident=frozenset(),
            refusal=None,
            stuck=None,
        )

    async def catalog(self, _: Any, names: tuple[str, ...] | None = None) -> Catalog:
        engine = ControlEngine(*self.adapters)
        infos = {info.name: info for info in engine.adapters()}
        entries = {
            name: Entry(
                info=replace(infos[name], receipt=RECEIPT),
                generations=engine.generations(name),
                record=self._record(paths),
                head=None,
                has_own_tokens=False,
            )
            for name, paths in self.adapters.items()
            if names is None or name in names
        }
        return Catalog(entries=entries, gone={}, failures=(), model_head=None)

    @staticmethod
    def _record(paths: list[str]) -> AdapterRecord:
        numbers = range(1, len(paths) + 1)
        history = tuple(
            Published(number, path, path, 0.0) for number, path in zip(numbers, paths, strict=True)
        )
        kept = tuple(Publication(number, path, None) for number, path in zip(numbers, paths, strict=True))
        last = len(paths)
        return AdapterRecord(kept, NameHistory(last, last, tuple(numbers), {}, history, ()), False)

    async def tokenizer(self, _: Any, __: str | None) -> str:
        return "the model's"

    async def check_adapter(self, _: Any, change: str, name: str, path: str, __: Any) -> Any:
        if path.endswith("bad"):
            return AdapterFormatError(f"{path} is malformed")
        self._checked[change] = (name, path)
        return RECEIPT

    async def register_adapter(self, _: Any, change: str, __: Any, replace: bool, *___: float | None) -> Any:
        name, path = self._checked.pop(change)
        paths = self.adapters.get(name, [])
        if paths and not replace and paths[-1] != path:
            return InvalidRequestError(f"adapter {name!r} is registered with other content")
        self.adapters[name] = paths if paths[-1:] == [path] else [*paths, path]
        return RECEIPT

    async def forget_checked(self, _: Any, change: str) -> None:
        self._checked.pop(change, None)

    async def unload_adapter(self, _: Any, name: str) -> Any:
        del self.adapters[name]

    async def restore(self, _: Any, state: FleetState) -> Any:
        self.adapters = {
            name: [one.path for one in record.publications] for name, record in state.adapters.items()
        }

    async def restore_one(self, _: Any, name: str, record: AdapterRecord | None) -> Any:
        self.adapters.pop(name, None)
        if record is not None:
            self.adapters[name] = [one.path for one in record.publications]


class FakeHandle:
    """Of a deployment with these replicas; a call goes to the first that is ranked and lives."""

    def __init__(self, *replicas: FakeReplica) -> None:
        self.replicas = list(replicas)

    def options(self, **_: Any) -> FakeHandle:
        return self

    def broadcast(self, method: str) -> Any:
        living = [one for one in self.replicas if not one.died.is_set()]

        class Answers:
            async def results_async(self, **_: Any) -> list[Any]:
                return [await getattr(one, method)() for one in living]

        return Answers()

    def __getattr__(self, method: str) -> Any:
        return FakeMethod(self, method)


class FakeMethod:
    def __init__(self, handle: FakeHandle, method: str) -> None:
        self._handle = handle
        self._method = method

    def remote(self, ranking: tuple[str, ...], *args: Any) -> Any:
        (target,) = (one for one in self._handle.replicas if one.name == ranking[0])
        target.calls.append((self._method, args))
        function: Callable[..., Any] = getattr(target, self._method)
        if self._method == "link":
            return FakeMessages(function(ranking, *args))
        return asyncio.ensure_future(self._answer(target, function, ranking, *args))

    async def _answer(self, target: FakeReplica, function: Callable[..., Any], *args: Any) -> Any:
        if self._method in target.refuses:
            return target.refuses[self._method]
        if self._method in target.hangs:
            await asyncio.Event().wait()
        answering = asyncio.ensure_future(function(*args))
        dying = asyncio.ensure_future(target.died.wait())
        done, _ = await asyncio.wait({answering, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if answering not in done:
            answering.cancel()
            raise DiedError(f"{target.name} has died")
        return answering.result()


class FakeMessages:
    """A stream that can be cancelled."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        pass
