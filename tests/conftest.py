"""Fixtures shared by all tests: the embedded SmolLM2, and transformers running the same file."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve.loader import default_model_path


@cache
def _read_once() -> dict[str, Any]:
    """What transformers calls for each thing that it takes of a .gguf file: together half a minute."""
    import gguf  # noqa: PLC0415  a GPU machine may lack it

    return {"GGUFReader": cache(gguf.GGUFReader), "get_tensor_name_map": cache(gguf.get_tensor_name_map)}


@contextmanager
def _gguf_is_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, function in _read_once().items():
            patch.setattr(f"gguf.{name}", function)
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    return str(default_model_path())


@pytest.fixture(scope="session")
def hf_smollm2_tokenizer(smollm2_path: str) -> Any:
    """transformers' tokenizer of the file, cutting digits apart as SmolLM2's tokenizer.json does."""
    from tokenizers import pre_tokenizers  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415  slow to import

    path = Path(smollm2_path)
    with _gguf_is_read_once():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers cuts every GPT-2 vocabulary as GPT-2 does, unless it knows tokenizer.ggml.pre
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def hf_smollm2(smollm2_path: str, hf_smollm2_tokenizer: Any) -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  slow to import

    path = Path(smollm2_path)
    with _gguf_is_read_once():
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), hf_smollm2_tokenizer


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any
) -> tuple[Path, torch.nn.Module]:
    from tests.e2e.tiny import make_tiny_model  # noqa: PLC0415  slow to import

    path = tmp_path_factory.mktemp("tiny")
    return path, make_tiny_model(path, hf_smollm2_tokenizer)


@pytest.fixture(scope="session")
def tiny_adapters(
    tiny_model: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    from tests.e2e.tiny import make_tiny_adapters  # noqa: PLC0415  slow to import

    return make_tiny_adapters(tiny_model[1], tmp_path_factory.mktemp("tiny-adapters"))


@pytest.fixture(scope="session")
def tiny_expected(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> dict[str, list[int]]:
    from tests.e2e.tiny import peft_answers  # noqa: PLC0415  slow to import

    return peft_answers(tiny_model[1], tiny_adapters)
