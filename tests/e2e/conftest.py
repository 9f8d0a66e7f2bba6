"""Real PEFT adapters on the real model, and PEFT itself as the oracle."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loraserve import LLM

from tests.e2e.oracle import HETEROGENEOUS, PeftOracle, make_adapter


@pytest.fixture(scope="session")
def peft_base(hf_smollm2: Any) -> torch.nn.Module:
    """A copy for PEFT, which puts its layers into the model it is given."""
    return copy.deepcopy(hf_smollm2[0])


@pytest.fixture(scope="session")
def adapter_paths(peft_base: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("adapters")
    return {
        spec.name: str(make_adapter(peft_base, spec, directory, seed))
        for seed, spec in enumerate(HETEROGENEOUS)
    }


@pytest.fixture(scope="session")
def peft_oracle(peft_base: torch.nn.Module, adapter_paths: dict[str, str]) -> PeftOracle:
    return PeftOracle(peft_base, adapter_paths)


@pytest.fixture(scope="session")
def llm_float32(smollm2_path: str, adapter_paths: dict[str, str]) -> Iterator[LLM]:
    with LLM(
        smollm2_path, adapters=adapter_paths, dtype="float32", quantization="none", memory="2GiB"
    ) as llm:
        yield llm
