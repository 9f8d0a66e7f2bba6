"""A crowd begins a few at a time."""

import asyncio
from collections import Counter

import pytest
from loraserve.server.http.turns import PER_TURN, Turns


def test_others_run_between_a_few_of_a_crowd() -> None:
    async def crowd() -> Counter[int]:
        turns, begun, num_turns = Turns(), Counter[int](), 0

        def count() -> None:
            nonlocal num_turns
            num_turns += 1
            asyncio.get_running_loop().call_soon(count)

        async def begin() -> None:
            await turns.take()
            begun[num_turns] += 1

        count()
        await asyncio.gather(*(begin() for _ in range(100)))
        await turns.take()  # and one that comes later, by itself
        return begun

    begun = asyncio.run(crowd())
    assert sum(begun.values()) == 100
    assert max(begun.values()) <= PER_TURN


def test_one_alone_begins_at_once_and_crowds_keep_their_order() -> None:
    async def begin_all() -> list[int]:
        turns, begun = Turns(), []

        async def begin(index: int) -> None:
            await turns.take()
            begun.append(index)

        with pytest.raises(StopIteration):
            begin(-1).send(None)  # did not wait
        await asyncio.gather(*(begin(index) for index in range(20)))
        return begun

    assert asyncio.run(begin_all()) == [-1, *range(20)]


def test_who_leaves_the_crowd_holds_up_nobody() -> None:
    async def begin_some() -> int:
        turns, num_begun = Turns(), 0

        async def begin() -> None:
            nonlocal num_begun
            await turns.take()
            num_begun += 1

        tasks = [asyncio.create_task(begin()) for _ in range(30)]
        await asyncio.sleep(0)
        for task in tasks[PER_TURN::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return num_begun

    assert asyncio.run(begin_some()) == PER_TURN + 13
