"""Lines of batches go behind all else, and owners take turns."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from loraserve.server.batches import gate as gate_module
from loraserve.server.batches.gate import BatchGate


def run(scenario: Callable[[BatchGate, Any], Awaitable[None]], max_running: int = 8) -> None:
    """`scenario` is given a gate and what the server does beside: `waiting`, `others` (calls that run)."""

    async def main() -> None:
        load = SimpleNamespace(waiting=0, others=0)
        gate = BatchGate(max_running, lambda: load.waiting, lambda: load.others + gate.num_running)
        await asyncio.wait_for(scenario(gate, load), 10)
        assert gate.num_running == 0
        assert gate.num_waiting_lines == 0

    asyncio.run(main())


async def settle() -> None:
    await asyncio.sleep(3 * gate_module.POLL_S)


def test_as_many_as_allowed_begin_and_the_next_when_one_ends() -> None:
    async def scenario(gate: BatchGate, _: Any) -> None:
        turns = [asyncio.create_task(gate.take("a")) for _ in range(20)]
        for num_begun in range(8, 21):
            await settle()
            assert sum(turn.done() for turn in turns) == num_begun
            gate.give_back()
        for _ in range(7):
            gate.give_back()

    run(scenario)


def test_none_begins_while_somebody_waits_in_the_engine() -> None:
    async def scenario(gate: BatchGate, load: Any) -> None:
        load.waiting = 1
        turn = asyncio.create_task(gate.take("a"))
        await settle()
        assert not turn.done()
        load.waiting = 0
        await turn
        gate.give_back()

    run(scenario)


def test_beside_others_a_fourth_runs_and_all_once_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "BUSY_S", 0.2)

    async def scenario(gate: BatchGate, load: Any) -> None:
        load.others = 3
        turns = [asyncio.create_task(gate.take("a")) for _ in range(8)]
        await settle()
        assert gate.num_running == 2
        load.others = 0
        await settle()
        assert gate.num_running == 2
        await asyncio.gather(*turns)
        for _ in range(8):
            gate.give_back()

    run(scenario)


def test_one_at_least_runs_beside_others() -> None:
    async def scenario(gate: BatchGate, load: Any) -> None:
        load.others = 9
        await gate.take("a")
        gate.give_back()

    run(scenario, max_running=2)


def test_owners_take_turns() -> None:
    async def scenario(gate: BatchGate, _: Any) -> None:
        begun: list[str] = []

        async def line(owner: str) -> None:
            await gate.take(owner)
            begun.append(owner)
            await asyncio.sleep(0.001)
            gate.give_back()

        await asyncio.gather(*(line(owner) for owner in 20 * "a" + 5 * "b" + 3 * "c"))
        assert begun[:13].count("b") >= 4
        assert begun[:13].count("c") == 3

    run(scenario, max_running=1)


def test_who_gives_up_waiting_takes_nothing() -> None:
    async def scenario(gate: BatchGate, load: Any) -> None:
        load.waiting = 1
        turns = [asyncio.create_task(gate.take("a")) for _ in range(3)]
        await settle()
        turns[0].cancel()
        load.waiting = 0
        await settle()
        assert gate.num_running == 2
        load.waiting = 1
        late = asyncio.create_task(gate.take("a"))
        await asyncio.sleep(0)
        load.waiting = 0
        gate._let_through()
        assert gate.num_running == 3
        late.cancel()  # it was let through, and does not know yet
        await asyncio.gather(turns[0], late, return_exceptions=True)
        assert late.cancelled()
        assert gate.num_running == 2
        gate.give_back()
        gate.give_back()

    run(scenario)
