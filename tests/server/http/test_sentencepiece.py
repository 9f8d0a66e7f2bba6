"""A tokenizer as Llama 2's: what is echoed, streamed and listed joins as transformers joins it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve import AsyncEngine, EngineConfig
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.server.http.http_thread import HttpThread

PIECES = ["t", "h", "e", "r", "▁", "tr", "ee", "th", "tree", "the", "▁tree", "▁the", "<s>", "</s>"]
MERGES = [("t", "r"), ("e", "e"), ("t", "h"), ("tr", "ee"), ("th", "e"), ("▁", "tree"), ("▁", "the")]
TREE = 256 + PIECES.index("▁tree")
NUM_TOKENS = 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, MERGES, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Always answers with ▁tree: every logit is 0 but that one's."""
    path = tmp_path_factory.mktemp("sentencepiece")
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=268,
        eos_token_id=269,
    )
    llama = LlamaForCausalLM(config)
    with torch.no_grad():
        llama.model.embed_tokens.weight.fill_(1.0)
        for projection in ("o_proj", "down_proj"):
            for name, weight in llama.named_parameters():
                if projection in name:
                    weight.zero_()
        llama.lm_head.weight.zero_()
        llama.lm_head.weight[TREE] = 1.0
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def client(model: Path) -> Iterator[httpx.Client]:
    config = EngineConfig(model=str(model), dtype="float32", memory="4MiB", num_threads=1)
    with (
        HttpThread(lambda: AsyncEngine(config), served_names=("m",)) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as client,
    ):
        yield client


@pytest.fixture(params=["the", "the tree", [256 + PIECES.index("▁the")], [268]])
def prompt(request: pytest.FixtureRequest) -> Any:
    return request.param


def whole(tokenizer: PreTrainedTokenizerFast, prompt: str | list[int]) -> tuple[str, str]:
    """transformers' text of the prompt, and of the prompt with the answer."""
    ids = tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
    texts = [tokenizer.decode(one, skip_special_tokens=True) for one in (ids, [*ids, *[TREE] * NUM_TOKENS])]
    return texts[0], texts[1]


def lines(answer: httpx.Response) -> list[Any]:
    events = (line.removeprefix("data:") for line in answer.text.split("\n\n"))
    return [json.loads(event) for event in events if event.strip() not in ("", "[DONE]")]


def test_completions_join_prompt_and_answer(
    client: httpx.Client, tokenizer: PreTrainedTokenizerFast, prompt: Any
) -> None:
    before, joined = whole(tokenizer, prompt)
    body = {"model": "m", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
    for echo, expected in ((False, joined.removeprefix(before)), (True, joined)):
        text = client.post("/v1/completions", json=body | {"echo": echo}).json()["choices"][0]["text"]
        assert text.removeprefix("<s>") == expected
        streamed = lines(client.post("/v1/completions", json=body | {"echo": echo, "stream": True}))
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == text
    answer = client.post("/v1/completions", json=body | {"logprobs": 0}).json()["choices"][0]
    assert answer["logprobs"]["tokens"] == [" tree"] * NUM_TOKENS


@pytest.mark.parametrize("full", [False, True])
def test_tgi_joins_prompt_and_answer(
    client: httpx.Client, tokenizer: PreTrainedTokenizerFast, full: bool
) -> None:
    before, joined = whole(tokenizer, "the tree")
    expected = joined if full else joined.removeprefix(before)
    parameters = {"max_new_tokens": NUM_TOKENS, "return_full_text": full, "details": True}
    body = {"inputs": "the tree", "parameters": parameters}
    answer = client.post("/generate", json=body).json()
    assert answer["generated_text"] == expected
    assert "".join(one["text"] for one in answer["details"]["tokens"]) == " tree" * NUM_TOKENS
    events = lines(client.post("/generate_stream", json=body))
    assert "".join(event["token"]["text"] for event in events) == " tree" * NUM_TOKENS
    assert events[-1]["generated_text"] == expected
    parameters["decoder_input_details"] = True
    prefill = client.post("/generate", json=body).json()["details"]["prefill"]
    assert "".join(one["text"] for one in prefill) == before
