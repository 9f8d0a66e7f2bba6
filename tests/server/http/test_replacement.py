"""An adapter replaced again and again under clients: every answer is an old or a new one, none is refused."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve import AsyncEngine, EngineConfig
from loraserve.client import Client
from loraserve.sampling_params import SamplingParams

from tests.e2e.tiny import NUM_TOKENS, PROMPT
from tests.server.http.http_thread import HttpThread

NUM_CLIENTS = 4
NUM_REPLACEMENTS = 24
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def server(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> Iterator[HttpThread]:
    config = EngineConfig(
        model=str(tiny_model[0]),
        adapters={"x": tiny_adapters["a0"]},
        dtype="float32",
        memory="4MiB",
        max_num_seqs=3,
    )
    root = Path(tiny_adapters["a0"]).parent
    with HttpThread(lambda: AsyncEngine(config), adapter_roots=[root]) as server:
        yield server


def over_http(server: HttpThread) -> Callable[[str], None]:
    def replace(path: str) -> None:
        body = {"lora_name": "x", "lora_path": path, "load_inplace": True}
        answer = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)
        assert answer.status_code == 200, answer.text

    return replace


def over_grpc(server: HttpThread) -> Callable[[str], None]:
    client = Client(server.grpc_address, timeout=60)

    def replace(path: str) -> None:
        client.load_adapter("x", path, replace=True)

    return replace


class Asking:
    """Clients of `x`, over HTTP and gRPC, until told to stop; counts what they were answered."""

    def __init__(self, server: HttpThread) -> None:
        self._server = server
        self._stop = threading.Event()
        self.answers: Counter[Any] = Counter()
        asks = [self._ask_http, self._ask_grpc] * (NUM_CLIENTS // 2)
        self._threads = [threading.Thread(target=ask) for ask in asks]

    def _ask_http(self) -> None:
        body = {"model": "x", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 0}
        with httpx.Client(base_url=self._server.url, timeout=60) as http:
            while not self._stop.is_set():
                answer = http.post("/v1/completions", json=body | {"ignore_eos": True})
                choices = answer.json().get("choices")
                self.answers[choices[0]["text"] if choices else (answer.status_code, answer.text)] += 1

    def _ask_grpc(self) -> None:
        with Client(self._server.grpc_address, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    self.answers[client.generate(PROMPT, GREEDY, adapter="x")[0].text] += 1
                except Exception as error:
                    self.answers[repr(error)] += 1

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("way", [over_http, over_grpc])
def test_clients_of_an_adapter_under_replacement_are_all_answered(
    server: HttpThread,
    tiny_adapters: dict[str, str],
    way: Callable[[HttpThread], Callable[[str], None]],
) -> None:
    replace, texts = way(server), {}
    with Client(server.grpc_address, timeout=60) as client:
        for name in ("a1", "a0"):
            replace(tiny_adapters[name])
            texts[name] = client.generate(PROMPT, GREEDY, adapter="x")[0].text
        assert texts["a0"] != texts["a1"]
        with Asking(server) as asking:
            for index in range(NUM_REPLACEMENTS):
                name = f"a{index % 2}"
                replace(tiny_adapters[name])
                assert client.generate(PROMPT, GREEDY, adapter="x")[0].text == texts[name]
        assert set(asking.answers) <= set(texts.values()), asking.answers
        assert asking.answers.total() >= NUM_CLIENTS
        assert [adapter.name for adapter in client.adapters()] == ["x"]


def test_a_refused_replacement_over_grpc_leaves_the_old_adapter(
    server: HttpThread, tiny_adapters: dict[str, str], tmp_path: Path
) -> None:
    with Client(server.grpc_address, timeout=60) as client:
        client.load_adapter("x", tiny_adapters["a2"], replace=True)
        before = client.generate(PROMPT, GREEDY, adapter="x")[0].token_ids
        with pytest.raises(Exception, match=str(tmp_path)):
            client.load_adapter("x", str(tmp_path), replace=True)
        with pytest.raises(Exception, match="registered with other content"):
            client.load_adapter("x", tiny_adapters["a3"])
        assert client.generate(PROMPT, GREEDY, adapter="x")[0].token_ids == before
