"""The pool's bytes mean nothing until they are written: an answer never depends on what lay there."""

import pytest
from loraserve import LLM, SamplingParams

from tests.e2e.prompts import PROMPTS

PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pool_full_of_nans_gives_the_same_answers(
    smollm2_path: str, adapter_paths: dict[str, str], dtype: str
) -> None:
    adapters = [None, "r4-all", "patterns"] * 4
    with LLM(smollm2_path, adapter_paths, dtype=dtype, memory="512MiB") as llm:
        clean = llm.generate(PROMPTS, PARAMS, adapters)
    with LLM(smollm2_path, adapter_paths, dtype=dtype, memory="512MiB") as llm:
        llm._engine.runner.pool.fill_(0xFF)
        poisoned = llm.generate(PROMPTS, PARAMS, adapters)
    assert [o.token_ids for o in poisoned] == [o.token_ids for o in clean]
