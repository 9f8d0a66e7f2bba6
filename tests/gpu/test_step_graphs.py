"""Captured graphs and the table of adapters: what changes between replays changes what a graph computes."""

import pytest
import torch
from loraserve import _core

from tests.batches import HandBatch
from tests.gpu.device import Gpu
from tests.gpu.lora_building import GEOMETRY, LAYER, PROJECTIONS, Lora, decode_batch, make_lora

CAPACITY, GROUP = 4, 1
IN_FEATURES, OUT_FEATURES = PROJECTIONS[GROUP][0], sum(PROJECTIONS[GROUP][1])
PAGE_NBYTES = GEOMETRY.page_nbytes(torch.bfloat16)
FREE_PAGE = 600  # behind the adapters of `make_lora`


@pytest.fixture
def lora(gpu: Gpu) -> Lora:
    return make_lora(gpu, torch.bfloat16)


class Replay:
    """One fused projection, captured before any adapter was in a step."""

    def __init__(self, lora: Lora) -> None:
        self._lora, stream = lora, lora.gpu.stream
        self.x, self._y = (
            lora.random(CAPACITY, IN_FEATURES),
            lora.gpu.zeros(CAPACITY, OUT_FEATURES, dtype=lora.dtype),
        )
        step = self._begin(decode_batch(1))
        self._launch(step)  # loads the kernel, which a capture can't
        with lora.gpu.driver.capture(stream) as self._graph:
            self._launch(step)

    def _begin(self, batch: HandBatch) -> _core.CudaStep:
        lora = self._lora
        return lora.kernels.begin_step(
            batch.build(), lora.gpu.stream, padded_tokens=CAPACITY, padded_items=CAPACITY
        )

    def _launch(self, step: object) -> None:
        lora = self._lora
        x, y = self.x.data_ptr(), self._y.data_ptr()
        lora.kernels.lora(step, x, y, LAYER, GROUP, lora.gpu.stream)

    def __call__(self, slot: int, num_rows: int = 3) -> torch.Tensor:
        """What the graph adds to zeros for a step of `num_rows` rows of one adapter."""
        gpu = self._lora.gpu
        self._y.zero_()
        batch = decode_batch(num_rows, [(0, num_rows, slot, 1.0)])
        self._begin(batch)
        self._graph.replay(gpu.stream)
        gpu.synchronize()
        return self._y.clone()


def test_a_replay_follows_an_adapter_that_moved(lora: Lora) -> None:
    replay, bound, pool = Replay(lora), lora.reference._slots[0], lora.reference._pool
    before = replay(0)
    assert before[:3].any()
    assert not before[3:].any()
    num_pages = -(-bound.layout.nbytes // PAGE_NBYTES)
    lora.kernels.move_extent(0, bound.first_page, FREE_PAGE, num_pages, lora.gpu.stream)
    lora.gpu.synchronize()
    pool[: num_pages * PAGE_NBYTES] = 0xFF  # NaN, should anyone still look here
    assert torch.equal(replay(0), before)


def test_a_replay_serves_the_adapter_a_slot_was_bound_to_last(lora: Lora) -> None:
    replay = Replay(lora)
    bound = lora.reference._slots[5]
    expected = replay(5)
    assert not torch.equal(replay(0), expected)
    lora.kernels.set_adapter(0, bound.first_page, bound.layout, lora.gpu.stream)
    assert torch.equal(replay(0), expected)


def test_waves_have_a_limit_that_is_told(lora: Lora) -> None:
    waves = [[(0, 1, 0, 1.0)]] * 17
    with pytest.raises(ValueError, match="a request combines 17 adapters, limit on CUDA is 16"):
        lora.kernels.begin_step(decode_batch(1, *waves).build(), lora.gpu.stream)
    step = lora.kernels.begin_step(decode_batch(1, *waves[:16]).build(), lora.gpu.stream)
    assert (step.num_waves, step.has_adapters) == (16, True)


@pytest.mark.parametrize(("num_items", "num_launches"), [(0, 0), (2, 1), (None, 0)])
def test_a_graph_holds_launches_for_adapters_only_where_it_makes_room_for_them(
    lora: Lora, num_items: int | None, num_launches: int
) -> None:
    x, y = lora.random(CAPACITY, IN_FEATURES), lora.gpu.zeros(CAPACITY, OUT_FEATURES, dtype=lora.dtype)
    batch, stream = decode_batch(1).build(), lora.gpu.stream
    step = lora.kernels.begin_step(batch, stream, padded_tokens=CAPACITY, padded_items=num_items)
    assert step.has_adapters == (num_launches > 0)
    lora.run(step, x, y, GROUP)
    with lora.gpu.driver.capture(stream) as graph:
        lora.kernels.lora(step, x.data_ptr(), y.data_ptr(), LAYER, GROUP, stream)
    assert graph.num_nodes == num_launches


def test_a_step_of_more_work_than_it_makes_room_for_is_refused(lora: Lora) -> None:
    batch = decode_batch(3, [(row, row + 1, row, 1.0) for row in range(3)]).build()
    assert batch.num_items == 3
    begin, stream = lora.kernels.begin_step, lora.gpu.stream
    with pytest.raises(ValueError, match="decode items of a wave is 3, limit is 3"):
        begin(batch, stream, padded_tokens=CAPACITY, padded_items=2)
    with pytest.raises(ValueError, match="items that padding makes room for is 161, limit is 161"):
        begin(batch, stream, padded_tokens=CAPACITY, padded_items=161)
    with pytest.raises(ValueError, match="padded_items is given without padded_tokens"):
        begin(batch, stream, padded_items=3)
