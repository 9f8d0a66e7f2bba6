"""A chat that sets no max_tokens, on a model whose context is far longer than what its memory holds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve import AsyncEngine, EngineConfig, SamplingParams
from loraserve.client import Client
from transformers import LlamaConfig, LlamaForCausalLM

from tests.peft_writer import llama_shape, write_adapter
from tests.server.http.http_thread import HttpThread

NUM_PAGES = 12
PAGE_NBYTES = 16 * 2 * 2 * 2 * 16 * 4  # tokens, layers, K and V, heads, head_dim, bytes
CONTEXT = NUM_PAGES * 16
MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def server(hf_smollm2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpThread]:
    path: Path = tmp_path_factory.mktemp("long-context")
    config = LlamaConfig(
        vocab_size=len(hf_smollm2_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    hf_smollm2_tokenizer.save_pretrained(path)
    adapter = write_adapter(path / "adapter", llama_shape(2, 64, 4, 2, 16, 96), rank=8)
    engine = EngineConfig(
        model=str(path),
        adapters={"tuned": str(adapter)},
        dtype="float32",
        memory=NUM_PAGES * PAGE_NBYTES,
        num_threads=1,
    )
    with HttpThread(lambda: AsyncEngine(engine), served_names=("m",)) as server:
        yield server


def test_the_served_context_is_what_the_pool_holds(server: HttpThread) -> None:
    info = httpx.get(f"{server.url}/info").json()
    assert (info["max_total_tokens"], info["max_input_tokens"], info["num_pages"]) == (
        CONTEXT,
        CONTEXT - 1,
        NUM_PAGES,
    )
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == CONTEXT
    with Client(server.grpc_address) as client:
        assert client.info().max_model_len == CONTEXT


@pytest.mark.parametrize("fields", [{}, {"min_tokens": 20}])
def test_an_unset_limit_is_what_fits(server: HttpThread, fields: dict[str, int]) -> None:
    expected = {"m": CONTEXT, "tuned": CONTEXT - 16 * adapter_pages(server)}
    assert expected["tuned"] < expected["m"]
    for model, num_tokens in expected.items():
        body = {"model": model, "messages": MESSAGES, "temperature": 0, "ignore_eos": True, **fields}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60.0)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["total_tokens"] == num_tokens
        assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_grpc_can_ask_for_what_fits(server: HttpThread) -> None:
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    with Client(server.grpc_address) as client:
        usage = client.generate(messages=MESSAGES, params=params)[0].usage
    assert usage is not None
    assert usage.prompt_tokens + usage.completion_tokens == CONTEXT


def adapter_pages(server: HttpThread) -> int:
    (adapter,) = server.engine.adapters()
    return -(-adapter.nbytes // PAGE_NBYTES)
