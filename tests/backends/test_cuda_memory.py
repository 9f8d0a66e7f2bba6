"""How the CUDA backend shares out a card: a pretend one, whose kernels do nothing."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve import _core
from loraserve.backends.base import PlacedModel
from loraserve.backends.cuda.backend import CudaBackend
from loraserve.backends.machine_memory import DeviceMemory
from loraserve.config import EngineConfig
from loraserve.errors import CapacityError
from loraserve.models.config import ModelConfig
from loraserve.models.ops import KvGeometry
from loraserve.models.weights import BuildDecoder

from tests.backends.test_memory_plan import LLAMA_3_8B, dense_nbytes, geometry

GIB = 2**30
MODEL = ModelConfig.from_hf(LLAMA_3_8B)
PAGE_NBYTES = geometry(MODEL).page_nbytes(torch.bfloat16)
TAKEN = 19 * GIB  # of weights and the largest step


class Card:
    """A `CudaDevice` of so many GiB."""

    device = torch.device("cpu")

    def __init__(self, total: float, free: float) -> None:
        self._memory = DeviceMemory(int(total * GIB), int(free * GIB), "the GPU")
        self.num_captures = 0
        self.capture_fails = False
        self.first_graph_nbytes, self.graph_nbytes = 0, 0
        self._held_nbytes = 0

    def memory(self) -> DeviceMemory:
        return self._memory

    def peak_nbytes(self, run: Callable[[], object]) -> int:
        run()
        return TAKEN

    def growth_nbytes(self, run: Callable[[], object]) -> int:
        before = self._held_nbytes
        run()
        return self._held_nbytes - before

    def empty_caches(self) -> None:
        """Nothing is kept."""

    def graph_memory(self) -> list[int]:
        """What was captured in it."""
        return []

    def capture(self, run: Callable[[], torch.Tensor], memory: list[int]) -> Callable[[], torch.Tensor]:
        if self.capture_fails:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        self._held_nbytes += self.graph_nbytes if memory else self.first_graph_nbytes
        memory.append(self.num_captures)
        self.num_captures += 1
        return run


class FakeOps:
    """Counts the rows of its steps."""

    def begin_step(self, batch: _core.Batch) -> _core.Batch:
        return batch

    def begin_padded_step(self, batch: _core.Batch, num_tokens: int, num_items: int) -> None:
        assert batch.num_tokens == 0


class FakeDecoder:
    """Whose steps fail if they are larger than `most_tokens`."""

    def __init__(self) -> None:
        self.batches: list[_core.Batch] = []
        self.most_tokens = 10**9

    def linears(self) -> list[Any]:
        return []

    def logits(self, ops: Any, batch: _core.Batch | None) -> torch.Tensor:
        if batch is not None:
            self.batches.append(batch)
            if batch.num_tokens > self.most_tokens:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return torch.zeros(1, 4)


class FakeBackend(CudaBackend):
    """Allocates nothing; the weights are there already."""

    def __init__(self, card: Card, **settings: Any) -> None:
        device: Any = card
        super().__init__(EngineConfig(model="m", **settings), torch.bfloat16, device)
        self.num_pages: list[int] = []
        self.decoder: Any = FakeDecoder()

    def build_ops(self, model: ModelConfig, geometry: KvGeometry, num_pages: int) -> Any:
        self.num_pages.append(num_pages)
        ops: Any = FakeOps()
        self._ops = ops
        return ops

    def run(self) -> PlacedModel:
        return self.place(
            MODEL,
            geometry(MODEL),
            BuildDecoder(dense_nbytes(MODEL), lambda packer, num_positions: self.decoder, Path("model")),
        )


def taken_by(num_pages: int) -> int:
    return TAKEN - num_pages * PAGE_NBYTES


@pytest.mark.parametrize(("share", "free"), [(0.9, 79.0), (0.5, 79.0), (0.9, 60.0)])
def test_the_pool_is_what_weights_and_the_largest_step_leave_of_the_share(share: float, free: float) -> None:
    backend = FakeBackend(Card(80, free), gpu_memory_utilization=share)
    placed = backend.run()
    pages_of_step, num_pages = backend.num_pages
    budget = min(int(share * 80 * GIB), int(free * GIB)) - taken_by(pages_of_step)
    assert placed.num_pages == num_pages == budget // PAGE_NBYTES
    assert placed.max_model_len == min(MODEL.context_limit, 16 * num_pages)


def test_less_than_the_share_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    FakeBackend(Card(80, 60)).run()
    message = "gpu_memory_utilization is 0.9, which is 72.0 GiB of the GPU, but only 60.0 GiB are free"
    assert message in caplog.text


def test_the_pool_is_told_in_tokens_and_adapters(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loraserve.backends.memory_plan")
    num_pages = FakeBackend(Card(80, 79)).run().num_pages
    assert f"{16 * num_pages} tokens of KV cache or {num_pages // 40} adapters of rank 16" in caplog.text


def test_the_largest_step_is_run_once_before_the_pool_is_sized() -> None:
    backend = FakeBackend(Card(80, 79), max_batched_tokens=1000, max_num_seqs=48)
    backend.run()
    (batch,) = backend.decoder.batches
    assert (batch.num_tokens, batch.num_prefill_tokens, batch.num_samples) == (1000, 1000, 48)
    assert batch.slot_end <= 16 * backend.num_pages[0] < 16 * 4


def test_a_context_below_the_step_bounds_its_sequences() -> None:
    backend = FakeBackend(Card(80, 79), max_batched_tokens=4096, max_num_seqs=2, max_model_len=500)
    backend.run()
    assert backend.decoder.batches[0].num_tokens == 1000


def test_memory_that_is_given_is_taken_if_it_is_there() -> None:
    assert FakeBackend(Card(80, 79), memory="4GiB").run().num_pages == 4 * GIB // PAGE_NBYTES
    with pytest.raises(CapacityError, match=r"memory is \d+ bytes \(62.0 GiB\), the GPU with 80.0 GiB can't"):
        FakeBackend(Card(80, 79), memory="62GiB").run()


def test_graphs_are_captured_at_start_unless_they_are_switched_off() -> None:
    card = Card(80, 79)
    backend = FakeBackend(card, max_num_seqs=4)
    backend.run()
    assert backend._graphs is not None
    assert backend._graphs.num_captured == 6  # 1, 2 and 4 rows, with and without adapters
    num_captures = card.num_captures
    FakeBackend(card, max_num_seqs=4, cuda_graphs=False).run()
    assert card.num_captures == num_captures


def test_the_pool_leaves_room_for_the_graphs_captured_after_it() -> None:
    def num_pages(**settings: Any) -> int:
        card = Card(80, 79)
        card.first_graph_nbytes, card.graph_nbytes = GIB, GIB // 16
        backend = FakeBackend(card, max_num_seqs=256, **settings)
        num_pages = backend.run().num_pages
        assert (backend._graphs is None) == (not settings.get("cuda_graphs", True))
        assert backend._graphs is None or backend._graphs.num_captured == 78
        return num_pages

    room = (num_pages(cuda_graphs=False) - num_pages()) * PAGE_NBYTES
    assert abs(room - (GIB + 77 * GIB // 16)) <= PAGE_NBYTES


def test_graphs_that_take_more_than_was_measured_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Growing(Card):
        def capture(self, *arguments: Any) -> Callable[[], torch.Tensor]:
            self.graph_nbytes += 2**20
            return super().capture(*arguments)

    FakeBackend(Growing(80, 79), max_num_seqs=256).run()
    assert "CUDA graphs take" in caplog.text
    assert "lower gpu_memory_utilization if steps run out of memory" in caplog.text
    caplog.clear()
    FakeBackend(Card(80, 79), max_num_seqs=256).run()
    assert "CUDA graphs take" not in caplog.text


def test_each_shortage_is_a_typed_error_with_sizes_and_remedy() -> None:
    with pytest.raises(
        CapacityError, match=r"takes 15.0 GiB of weights .* the GPU has 14.4 GiB free of 16.0"
    ):
        FakeBackend(Card(16, 15)).run()
    with pytest.raises(CapacityError, match=r"no memory is left for KV cache .* lower max_batched_tokens"):
        FakeBackend(Card(20, 19.5)).run()

    loading = FakeBackend(Card(24, 23))

    def out_of_memory(*_: object) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    with pytest.raises(CapacityError, match=r"weights of model m take 15.0 GiB .* 21.6 GiB free of 24.0 GiB"):
        loading.place(MODEL, geometry(MODEL), BuildDecoder(dense_nbytes(MODEL), out_of_memory, Path("model")))

    stepping = FakeBackend(Card(80, 79))
    stepping.decoder.most_tokens = 100
    with pytest.raises(
        CapacityError, match="the largest step, of 2048 tokens and 256 sampled rows, finds no"
    ):
        stepping.run()

    card = Card(80, 79)
    card.capture_fails = True
    with pytest.raises(CapacityError, match="to capture CUDA graphs: lower gpu_memory_utilization"):
        FakeBackend(card).run()
