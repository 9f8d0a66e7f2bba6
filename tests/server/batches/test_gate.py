"""Lines of batches go behind all else, and owners take turns."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from loraserve.server.batches import gate as gate_module
from loraserve.server.batches.gate import BatchGate, BatchSlot


def run(scenario: Callable[[BatchGate, Any], Awaitable[None]], max_running: int = 8) -> None:
    """`scenario` is given a gate and what the server does beside: `waiting`, `others` (calls that run)."""

    async def main() -> None:
        load = SimpleNamespace(waiting=0, others=0)
        gate = BatchGate(max_running, lambda: load.waiting, lambda: load.others + gate.num_running)
        await asyncio.wait_for(scenario(gate, load), 10)
        assert gate.num_running == 0
        assert gate.num_waiting_lines == 0
        assert gate._beginning_nbytes == 0

    asyncio.run(main())


async def settle() -> None:
    await asyncio.sleep(3 * gate_module.POLL_S)


class Lines:
    """Lines of a scenario, each asking on its own."""

    def __init__(self, gate: BatchGate) -> None:
        self._gate = gate
        self.turns: list[asyncio.Task[BatchSlot]] = []

    def ask(self, number: int, owner: str = "a", nbytes: int = 1) -> None:
        self.turns += [asyncio.create_task(self._gate.take(owner, nbytes)) for _ in range(number)]

    @property
    def slots(self) -> list[BatchSlot]:
        return [turn.result() for turn in self.turns if turn.done() and not turn.cancelled()]

    def begin(self) -> None:
        for slot in self.slots:
            slot.begun()

    async def end(self) -> None:
        """All of them, the next as well."""
        ended: set[BatchSlot] = set()
        while len(ended) < len(self.turns):
            for slot in set(self.slots) - ended:
                ended.add(slot)
                slot.give_back()
            await asyncio.sleep(0.001)


def test_as_many_as_allowed_run_and_the_next_when_one_ends() -> None:
    async def scenario(gate: BatchGate, _: Any) -> None:
        lines = Lines(gate)
        lines.ask(20)
        await settle()
        assert len(lines.slots) == 8
        lines.slots[0].give_back()
        await settle()
        assert len(lines.slots) == 9
        assert gate.num_running == 8
        for slot in lines.slots[1:]:
            slot.give_back()
        await settle()
        assert len(lines.slots) == 17
        for slot in lines.slots[9:]:
            slot.give_back()
        await settle()
        for slot in lines.slots[17:]:
            slot.give_back()

    run(scenario)


def test_few_prompts_are_computed_at_once() -> None:
    async def scenario(gate: BatchGate, load: Any) -> None:
        lines = Lines(gate)
        lines.ask(8, nbytes=gate_module.BEGINNING_NBYTES // 2)
        for num_begun in (2, 4, 6, 8):
            await settle()
            assert len(lines.slots) == num_begun
            lines.begin()
            lines.begin()
        await lines.end()
        lines = Lines(gate)
        lines.ask(2, nbytes=9 * gate_module.BEGINNING_NBYTES)
        await settle()
        assert len(lines.slots) == 1  # a long one begins alone
        lines.begin()
        await settle()
        assert len(lines.slots) == 2
        await lines.end()

    run(scenario)


def test_a_line_that_takes_long_to_begin_holds_up_others_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate_module, "BEGINNING_S", 0.1)

    async def scenario(gate: BatchGate, _: Any) -> None:
        lines = Lines(gate)
        lines.ask(2, nbytes=gate_module.BEGINNING_NBYTES)
        await settle()
        assert len(lines.slots) == 1
        await asyncio.wait(lines.turns)
        await lines.end()

    run(scenario)


def test_none_begins_while_somebody_waits_in_the_engine() -> None:
    async def scenario(gate: BatchGate, load: Any) -> None:
        load.waiting = 1
        lines = Lines(gate)
        lines.ask(1)
        await settle()
        assert not lines.slots
        load.waiting = 0
        await lines.turns[0]
        await lines.end()

    run(scenario)


def test_beside_others_a_fourth_runs_one_after_the_other_and_all_once_they_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate_module, "BUSY_S", 0.3)

    async def scenario(gate: BatchGate, load: Any) -> None:
        load.others = 3
        lines = Lines(gate)
        lines.ask(8)
        for num_begun in (1, 2, 2):
            await settle()
            assert gate.num_running == num_begun
            lines.begin()
        load.others = 0
        await settle()
        assert gate.num_running == 2
        await asyncio.wait(lines.turns)
        await lines.end()

    run(scenario)


def test_one_at_least_runs_beside_others() -> None:
    async def scenario(gate: BatchGate, load: Any) -> None:
        load.others = 9
        (await gate.take("a", 1)).give_back()

    run(scenario, max_running=2)


def test_owners_take_turns() -> None:
    async def scenario(gate: BatchGate, _: Any) -> None:
        begun: list[str] = []

        async def line(owner: str) -> None:
            slot = await gate.take(owner, 10)
            begun.append(owner)
            await asyncio.sleep(0.001)
            slot.give_back()

        await asyncio.gather(*(line(owner) for owner in 20 * "a" + 5 * "b" + 3 * "c"))
        assert begun[:13].count("b") >= 4
        assert begun[:13].count("c") == 3

    run(scenario, max_running=1)


def test_who_gives_up_waiting_takes_nothing() -> None:
    async def scenario(gate: BatchGate, load: Any) -> None:
        load.waiting = 1
        lines = Lines(gate)
        lines.ask(3)
        await settle()
        lines.turns[0].cancel()
        load.waiting = 0
        await settle()
        assert gate.num_running == 2
        load.waiting = 1
        late = asyncio.create_task(gate.take("a", 1))
        await asyncio.sleep(0)
        load.waiting = 0
        gate._let_through()
        assert gate.num_running == 3
        late.cancel()  # it was let through, and does not know yet
        await asyncio.gather(lines.turns[0], late, return_exceptions=True)
        assert late.cancelled()
        assert gate.num_running == 2
        for slot in lines.slots:
            slot.give_back()

    run(scenario)
