"""CpuBackend: the pool's memory is touched before its first use."""

import subprocess
import sys
import types

import pytest
import torch
from loraserve import _core
from loraserve.backends import Extent
from loraserve.backends.cpu.backend import CpuBackend
from loraserve.config import EngineConfig


class Pretouch:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def use_above(self, start: int) -> None:
        self.calls.append(("above", start))


@pytest.fixture
def backend() -> CpuBackend:
    backend = CpuBackend(EngineConfig(model="smollm2"), torch.float32)
    backend._pool = torch.empty(1024, dtype=torch.uint8)
    backend._page_nbytes = 64
    return backend


def test_an_adapters_extent_is_in_use_before_it_is_written(backend: CpuBackend) -> None:
    pretouch = Pretouch()
    backend._pretouch = pretouch  # type: ignore[assignment]
    layout = types.SimpleNamespace()

    def load(address: int, nbytes: int) -> object:
        assert nbytes == 128
        assert address == backend.pool.data_ptr() + 3 * 64
        assert pretouch.calls == [("above", 3 * 64)]
        return layout

    assert backend.fill(Extent(0, 3, 128), load, 100) is layout  # type: ignore[arg-type]


def test_shutdown_ends_what_start_began(backend: CpuBackend) -> None:
    backend.shutdown()
    backend.pool.fill_(7)
    backend.start()
    backend.set_contended(True)
    backend.shutdown()
    backend.shutdown()
    assert (backend.pool == 7).all()


@pytest.mark.parametrize(("asked", "computes_with"), [(64, 2), (2, 2), (1, 1), (None, None)])
def test_threads_beyond_the_cores_are_capped_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: int | None,
    computes_with: int | None,
) -> None:
    monkeypatch.setattr(_core, "usable_cores", lambda: 2)
    backend = CpuBackend(EngineConfig(model="smollm2", num_threads=asked), torch.float32)
    assert backend._num_threads == computes_with
    warnings = [record.getMessage() for record in caplog.records]
    expected = "64 threads were asked for, this process may use 2 cores: it computes with 2"
    assert warnings == ([expected] if asked == 64 else [])


def test_usable_cores_are_those_of_the_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from loraserve import _core; print(_core.usable_cores())"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout == "1\n"
