"""Finds a device for the tests of this folder: a GPU, or the emulator; without either they are skipped."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from tests.gpu.device import Gpu, open_driver
from tests.gpu.driver import Driver


@pytest.fixture(scope="session")
def driver() -> Driver:
    driver, reason = open_driver()
    if driver is None:
        pytest.skip(reason)
    return driver


@pytest.fixture
def gpu(driver: Driver) -> Iterator[Gpu]:
    """The device; torch's own work goes on its stream too."""
    with ExitStack() as stack:
        if driver.is_emulated:
            stream = driver.create_stream()
            stack.callback(driver.destroy_stream, stream)
            device = torch.device("cpu")
        else:
            torch_stream = torch.cuda.Stream()
            stack.enter_context(torch.cuda.stream(torch_stream))
            stream, device = torch_stream.cuda_stream, torch.device("cuda", 0)
        gpu = Gpu(driver, device, stream)
        stack.callback(gpu.release)
        yield gpu
