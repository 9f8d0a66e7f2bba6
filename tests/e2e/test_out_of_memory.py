"""A step that finds no memory is tried again, or ends its own requests; the engine goes on."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import AsyncEngine, GenerateRequest, SamplingParams, _core
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.errors import CapacityError
from loraserve.sampling.sampler import Sampler

from tests.e2e.test_load_limits import drain, engine_of

PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = ["one two three four five six seven eight nine ten eleven twelve " * 3, "a", "b c"]


class Shortage:
    """Makes the next `num_left` runs of steps that `concerns` finds fail for want of memory."""

    def __init__(self, concerns: Callable[[_core.Batch], bool] = lambda _: True) -> None:
        self.num_left = self.num_emptied = 0
        self._concerns = concerns

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits = CpuBackend.logits

        def failing(backend: CpuBackend, decoder: Any, batch: _core.Batch) -> torch.Tensor:
            if self.num_left > 0 and self._concerns(batch):
                self.num_left -= 1
                raise torch.OutOfMemoryError("tried to allocate 3 GiB")
            return logits(backend, decoder, batch)

        def empty_caches(_: CpuBackend) -> None:
            self.num_emptied += 1

        monkeypatch.setattr(CpuBackend, "logits", failing)
        monkeypatch.setattr(CpuBackend, "empty_caches", empty_caches)


async def answers(engine: AsyncEngine) -> list[list[int] | Exception]:
    """Of all prompts at once: tokens, or the error."""
    streams = [await engine.submit(GenerateRequest(prompt=prompt, params=PARAMS)) for prompt in PROMPTS]
    return await asyncio.gather(*map(drain, streams), return_exceptions=True)  # type: ignore[arg-type]


def test_a_step_that_finds_memory_at_its_second_try_changes_nothing(
    tiny_model: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    shortage = Shortage()
    shortage.install(monkeypatch)

    async def main() -> None:
        async with engine_of(tiny_model[0], {}) as engine:
            expected = await answers(engine)
            for _ in range(3):
                shortage.num_left = 1
                assert await answers(engine) == expected
            assert shortage.num_emptied == 3

    asyncio.run(main())


@pytest.mark.parametrize("is_prefill", [False, True])
def test_a_step_without_memory_ends_its_requests_and_leaves_nothing_behind(
    tiny_model: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch, is_prefill: bool
) -> None:
    """Not even in the prefix cache: the prompts are answered as before."""
    shortage = Shortage(lambda batch: (batch.num_prefill_tokens > 0) == is_prefill)
    shortage.install(monkeypatch)

    async def main() -> None:
        async with engine_of(tiny_model[0], {}, max_batched_tokens=32) as engine:
            shortage.num_left = 2
            first = await answers(engine)
            failed = [answer for answer in first if isinstance(answer, Exception)]
            assert failed
            for error in failed:
                assert isinstance(error, CapacityError)
                assert "the device ran out of memory in a step of" in str(error)
                assert "lower max_batched_tokens, max_num_seqs or memory" in str(error)
            after = await answers(engine)
        async with engine_of(tiny_model[0], {}, max_batched_tokens=32) as engine:
            assert after == await answers(engine)
        for before, answer in zip(first, after, strict=True):
            assert before == answer or isinstance(before, CapacityError)

    asyncio.run(main())


def test_sampling_that_finds_no_memory_ends_its_requests(
    tiny_model: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample
    num_left = 1

    def failing(*args: Any) -> Any:
        nonlocal num_left
        num_left -= 1
        if num_left == 0:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        return sample(*args)

    monkeypatch.setattr(Sampler, "sample", failing)

    async def main() -> None:
        async with engine_of(tiny_model[0], {}) as engine:
            assert any(isinstance(answer, CapacityError) for answer in await answers(engine))
            assert not any(isinstance(answer, Exception) for answer in await answers(engine))

    asyncio.run(main())
