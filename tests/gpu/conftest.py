"""Finds a device for the tests of this folder: a GPU, or the emulator; without either they are skipped."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve.errors import ModelError
from loraserve.loader import default_model_path

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


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    try:
        return str(default_model_path())
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """As everywhere, but with a tokenizer made on the spot: a machine lent for a while has no other model."""
    from tests.e2e.tiny import make_tiny_model  # noqa: PLC0415  slow to import

    path = tmp_path_factory.mktemp("tiny")
    return path, make_tiny_model(path, _byte_tokenizer(49152))


def _byte_tokenizer(vocab_size: int) -> Any:
    """Bytes, then words nobody writes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  slow to import

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<{index}>" for index in range(len(alphabet), vocab_size))]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
