"""Over gRPC an adapter's requests are written, ended and read with the adapter's own tokens and template."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from loraserve import AsyncEngine, EngineConfig, SamplingParams
from loraserve.client import Client
from loraserve.errors import InvalidRequestError
from transformers import AutoTokenizer

from tests.server.adapter_texts import make_paths
from tests.server.server_thread import ServerThread

CHAT = [{"role": "user", "content": "what is a tree?"}]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_paths(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def client(paths: dict[str, Path]) -> Iterator[Client]:
    adapters = {name: str(path) for name, path in paths.items() if name != "base"}
    config = EngineConfig(
        model=str(paths["base"]), adapters=adapters, dtype="float32", memory="16MiB", num_threads=1
    )
    with ServerThread(lambda: AsyncEngine(config)) as server, Client(server.address) as client:
        yield client


def test_a_chat_is_rendered_and_ended_as_the_adapters_tokenizer_says(
    client: Client, paths: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(paths["chatml"])
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    end = tokenizer.eos_token_id
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={end: 100.0})
    (answer,) = client.generate(messages=CHAT, adapter="chatml", params=params)
    assert (answer.finish_reason, answer.text) == ("stop", "")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    with pytest.raises(InvalidRequestError, match="template"):
        client.generate(messages=CHAT, params=params)


def test_tokens_that_an_adapter_adds_are_read_and_written(client: Client, paths: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(paths["tools"])
    tool = tokenizer.convert_tokens_to_ids("<tool_call>")
    params = SamplingParams(temperature=0, max_tokens=2, logit_bias={tool: 100.0})
    (answer,) = client.generate("a <tool_call>", adapter="tools", params=params)
    assert answer.text == "<tool_call><tool_call>"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode("a <tool_call>"))
    (plain,) = client.generate("a <tool_call>", params=params)
    assert plain.text == ""  # the model has no such token
