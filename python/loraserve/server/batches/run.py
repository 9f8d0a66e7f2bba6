"""`BatchRun`: the lines of an input, answered a bounded number at once, each result written once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import orjson

from loraserve.engine.workers import Workers
from loraserve.server.batches.dispatch import Dispatcher
from loraserve.server.batches.lines import BadLine, Line
from loraserve.server.batches.results import Answer, Counts, Results, answer_line, error_line

SYNC_S = 1.0
LINES_PER_TURN = 64  # that need no answer, after which others may use the loop


class Slot(Protocol):
    """What a line holds while it is answered."""

    def begun(self) -> None:
        """Its answer has begun."""
        ...

    def give_back(self) -> None:
        """It has ended; told once."""
        ...


class Slots(Protocol):
    """How many lines may be answered at once."""

    async def take(self, nbytes: int) -> Slot:
        """Returns when there is one for a line of so many bytes."""
        ...


class FixedSlots:
    """Always the same number."""

    def __init__(self, number: int) -> None:
        self._semaphore = asyncio.Semaphore(number)

    async def take(self, nbytes: int) -> FixedSlots:
        """As of `Slots`."""
        await self._semaphore.acquire()
        return self

    def begun(self) -> None:
        """As of `Slot`."""

    def give_back(self) -> None:
        """As of `Slot`."""
        self._semaphore.release()


class BatchRun:
    """One pass over an input; `stop` ends it early.

    Args:
        fingerprint: of the input.
        lines: of the input, from its beginning; those that are done are passed over.
        dispatcher: what answers.
        results: where answers go.
        slots: which bound what is answered at once.
        counts: told of every line that is done now.
        on_done: called after each of them.
    """

    def __init__(
        self,
        fingerprint: str,
        lines: Iterator[Line | BadLine],
        dispatcher: Dispatcher,
        results: Results,
        slots: Slots,
        counts: Counts,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        self._fingerprint = fingerprint
        self._lines = lines
        self._dispatcher = dispatcher
        self._results = results
        self._slots = slots
        self._counts = counts
        self._on_done = on_done
        self._stop = asyncio.Event()
        self._error: Exception | None = None
        self._open: set[asyncio.Task[None]] = set()

    @property
    def is_stopped(self) -> bool:
        """Whether it was to end early."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Begin no line any more and abort those that are open; `run` then returns."""
        self._stop.set()

    async def run(self) -> None:
        """Answers all lines, or those before `stop`; what was written is synced.

        Raises:
            LoraserveError: results can't be written, or nothing answers any more.
        """
        async with self._syncing():
            try:
                await self._begin_all()
            finally:
                if self._open:
                    await asyncio.wait(self._open)
            if self._error is not None:
                raise self._error

    async def _begin_all(self) -> None:
        num_unanswered = 0
        for line in self._lines:
            if self._stop.is_set():
                return
            if self._results.is_done(line.number) or isinstance(line, BadLine):
                if isinstance(line, BadLine) and not self._results.is_done(line.number):
                    self._add(line.number, error_line(self._fingerprint, line), is_completed=False)
                num_unanswered += 1
                if num_unanswered % LINES_PER_TURN == 0:
                    await asyncio.sleep(0)
                continue
            slot = await self._take_slot(line)
            if slot is None:
                return
            task = asyncio.create_task(self._answer(line, slot))
            self._open.add(task)
            task.add_done_callback(self._open.discard)

    async def _take_slot(self, line: Line) -> Slot | None:
        """None if the run was stopped before there was one."""
        taking = asyncio.ensure_future(self._slots.take(len(line.body)))
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({taking, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not self._stop.is_set():
            return taking.result()
        taking.cancel()
        with suppress(asyncio.CancelledError):
            (await taking).give_back()
        return None

    async def _answer(self, line: Line, slot: Slot) -> None:
        try:
            answer = await self._dispatcher.send(line, self._stop, slot.begun)
            if answer is not None:
                self._count_tokens(answer)
                result = answer_line(self._fingerprint, line.number, line.custom_id, answer)
                self._add(line.number, result, is_completed=answer.is_completed)
        except Exception as error:
            self._error = self._error or error
            self._stop.set()
        finally:
            slot.give_back()

    def _add(self, number: int, result: bytes, *, is_completed: bool) -> None:
        self._results.add(number, result, is_completed=is_completed)
        self._counts.add(is_completed=is_completed)
        self._on_done()

    def _count_tokens(self, answer: Answer) -> None:
        body = orjson.loads(answer.body)
        usage = body.get("usage") if isinstance(body, dict) else None
        if isinstance(usage, dict):
            counts = self._counts
            counts.prompt_tokens += _number(usage, "prompt_tokens", "input_tokens")
            counts.completion_tokens += _number(usage, "completion_tokens", "output_tokens")

    @asynccontextmanager
    async def _syncing(self):  # type: ignore[no-untyped-def]
        syncs = Workers("writes of batches", 1, 4)

        async def sync_now_and_then() -> None:
            while True:
                await asyncio.sleep(SYNC_S)
                await syncs.run(self._results.sync)

        syncing = asyncio.create_task(sync_now_and_then())
        syncing.add_done_callback(self._on_synced)
        try:
            yield
        finally:
            syncing.cancel()
            await asyncio.wait({syncing})
            await syncs.run(self._results.sync)
            syncs.close()

    def _on_synced(self, syncing: asyncio.Task[None]) -> None:
        if not syncing.cancelled() and (error := syncing.exception()) is not None:
            assert isinstance(error, Exception)
            self._error = self._error or error
            self._stop.set()


def _number(usage: dict[str, object], *names: str) -> int:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int):
            return value
    return 0
