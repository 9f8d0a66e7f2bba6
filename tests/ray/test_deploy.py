"""Two replicas on a Ray cluster of this machine: one server to whoever asks, also while one is killed."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from loraserve import LLM, SamplingParams
from loraserve.client import Client

from tests.ray.deployment import Deployment

pytest.importorskip("ray", reason="needs loraserve[ray]: make test-ray")

ADAPTERS = Path(__file__).parents[2] / "examples/adapters"
NAMES = ("sql", "pirate", "json")
QUESTIONS = (
    "What is a tree?",
    "Table cats(name, age). Which cats are older than 9?",
    "Who was Ada Lovelace?",
)
PARAMS = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    arguments = ["smollm2", "--replicas", "2", "--dtype", "float32", "--memory", "256MiB", "--threads", "1"]
    arguments += ["--adapter-root", str(ADAPTERS), "--keep-generations", "2"]
    for name in NAMES[:2]:
        arguments += ["--adapter", f"{name}={ADAPTERS / name}"]
    with Deployment(arguments, tmp_path_factory.mktemp("deploy") / "log") as running:
        running.wait_for_replicas(2)
        yield running


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str | None, str], str]:
    """What one engine answers."""
    adapters = {name: str(ADAPTERS / name) for name in NAMES}
    llm = LLM("smollm2", adapters, dtype="float32", memory="256MiB", num_threads=1)
    asked = list(itertools.product((None, *NAMES), QUESTIONS))
    chats = [[{"role": "user", "content": question}] for _, question in asked]
    outputs = llm.chat(chats, PARAMS, adapter=[name for name, _ in asked])
    return {one: output.text for one, output in zip(asked, outputs, strict=True)}


def body(name: str | None, question: str, *, stream: bool = False, max_tokens: int = 12) -> dict[str, object]:
    return {
        "model": name or "smollm2",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_completion_tokens": max_tokens,
        "stream": stream,
    }


def told(response: httpx.Response) -> str:
    """The content of a stream."""
    text = ""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            text += chunk["choices"][0]["delta"].get("content") or ""
    return text


def load(deployment: Deployment, name: str, directory: str, **more: object) -> httpx.Response:
    body = {"name": name, "source": str(ADAPTERS / directory), **more}
    return deployment.http.post("/adapters", json=body)


def test_answers_are_those_of_one_engine(
    deployment: Deployment, expected: dict[tuple[str | None, str], str]
) -> None:
    asked = [one for one in expected if one[0] != "json"] * 2

    def ask(index: int) -> str:
        name, question = asked[index]
        if index % 2:
            with deployment.http.stream(
                "POST", "/v1/chat/completions", json=body(name, question, stream=True)
            ) as response:
                return told(response)
        response = deployment.http.post("/v1/chat/completions", json=body(name, question))
        return str(response.json()["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, range(len(asked))))
    assert answers == [expected[one] for one in asked]
    served = deployment.series("loraserve_replica_prefix_hit_tokens_total")
    assert len(served) == 2


def test_grpc_streams_and_composes(
    deployment: Deployment, expected: dict[tuple[str | None, str], str]
) -> None:
    with Client(deployment.grpc_address) as client:
        for name, question in [one for one in expected if one[0] != "json"]:
            chat = [{"role": "user", "content": question}]
            deltas = list(client.stream(messages=chat, params=PARAMS, adapter=name))
            assert "".join(delta.text for delta in deltas) == expected[name, question]
        chat = [{"role": "user", "content": QUESTIONS[0]}]
        (both,) = client.generate(messages=chat, params=PARAMS, adapter={"sql": 0.5, "pirate": 0.5})
        assert both.finish_reason in ("stop", "length")
        assert {info.name for info in client.adapters()} >= {"sql", "pirate"}


def test_a_load_reaches_all_replicas_before_it_is_answered(
    deployment: Deployment, expected: dict[tuple[str | None, str], str]
) -> None:
    before = deployment.series("loraserve_replica_adapters")
    assert load(deployment, "json", "json").is_success
    assert "json" in {one["id"] for one in deployment.http.get("/v1/models").json()["data"]}
    question = QUESTIONS[0]
    with ThreadPoolExecutor(32) as threads:  # more than its home takes
        answers = list(
            threads.map(
                lambda _: deployment.http.post("/v1/chat/completions", json=body("json", question)), range(64)
            )
        )
    assert [one.status_code for one in answers] == [200] * 64
    texts = {one.json()["choices"][0]["message"]["content"] for one in answers}
    assert texts == {expected["json", question]}
    deployment.wait_for(
        lambda: all(
            count == before[replica] + 1
            for replica, count in deployment.series("loraserve_replica_adapters").items()
        )
    )
    assert deployment.http.delete("/adapters/json").status_code == 204
    gone = deployment.http.post("/v1/chat/completions", json=body("json", question))
    assert gone.status_code == 404


def test_generations_are_counted_alike(deployment: Deployment) -> None:
    assert load(deployment, "turn", "sql").is_success
    assert load(deployment, "turn", "pirate").status_code == 400, "it is loaded with other content"
    assert load(deployment, "turn", "pirate", replace=True, expected_generation=1).is_success
    conflict = load(deployment, "turn", "sql", replace=True, expected_generation=1)
    assert conflict.status_code == 409, conflict.text
    answer = deployment.http.post("/v1/chat/completions", json=body("turn", QUESTIONS[0]))
    assert answer.headers["x-adapter-generation"] == "2"
    shares = deployment.http.put("/adapters/turn/shares", json={"shares": {"1": 0.5, "2": 0.5}})
    assert shares.status_code == 200, shares.text
    back = deployment.http.post("/adapters/turn/rollback", json={"generation": 1})
    assert back.is_success, back.text
    answer = deployment.http.post("/v1/chat/completions", json=body("turn", QUESTIONS[0]))
    assert answer.headers["x-adapter-generation"] == "1"
    assert deployment.http.post("/v1/chat/completions", json=body("turn@2", QUESTIONS[0])).status_code == 200
    shadow = deployment.http.put("/adapters/turn/shadow", json={"generation": 2, "fraction": 1.0})
    assert shadow.is_success, shadow.text
    deployment.http.post("/v1/chat/completions", json=body("turn", QUESTIONS[0]))
    assert deployment.http.delete("/adapters/turn/shadow").is_success


def test_an_adapter_that_cannot_be_read_changes_nothing(deployment: Deployment, tmp_path: Path) -> None:
    before = deployment.series("loraserve_replica_adapters")
    missing = load(deployment, "missing", "none-there")
    assert missing.status_code == 400, missing.text
    assert deployment.series("loraserve_replica_adapters") == before


def test_an_adapter_that_is_sent_is_served_by_all(deployment: Deployment) -> None:
    weights = (ADAPTERS / "sql/adapter_model.safetensors").read_bytes()
    config = (ADAPTERS / "sql/adapter_config.json").read_text()
    sent = deployment.http.put("/adapters/sent", params={"config": config}, content=weights)
    assert sent.status_code == 201, sent.text
    answer = deployment.http.post("/v1/chat/completions", json=body("sent", QUESTIONS[1])).json()
    asked = deployment.http.post("/v1/chat/completions", json=body("sql", QUESTIONS[1])).json()
    assert answer["choices"][0]["message"] == asked["choices"][0]["message"]
    assert deployment.http.delete("/adapters/sent").status_code == 204


def test_a_client_that_leaves_frees_its_pages(deployment: Deployment) -> None:
    with deployment.http.stream(
        "POST",
        "/v1/completions",
        json={"model": "smollm2", "prompt": "Once", "max_tokens": 4000, "stream": True, "ignore_eos": True},
    ) as response:
        next(response.iter_lines())
    deployment.wait_for(lambda: set(deployment.series("loraserve_replica_running_sequences").values()) == {0})


def test_a_deadline_travels(deployment: Deployment) -> None:
    late = deployment.http.post(
        "/v1/completions",
        json={"model": "smollm2", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True},
        headers={"x-request-timeout": "0.5"},
    )
    assert late.status_code == 408, late.text


def test_a_killed_replica_loses_no_request_and_comes_back_with_what_is_served(deployment: Deployment) -> None:
    assert load(deployment, "late", "pirate").is_success
    assert load(deployment, "late", "json", replace=True).is_success
    outcomes: Counter[str] = Counter()

    def ask(index: int) -> str:
        name = ("late", "sql", "pirate", None)[index % 4]
        request = body(name, f"{index}: tell a long story", stream=index % 2 == 0, max_tokens=48)
        try:
            response = deployment.http.post("/v1/chat/completions", json=request)
        except httpx.HTTPError as error:
            return f"not answered: {error!r}"
        if response.status_code == 503:
            return f"told: {response.json()['error']['code']}"
        if response.status_code != 200:
            return f"wrong: {response.text}"
        if '"code":"replica_lost"' in response.text:
            return "told in its stream"
        is_whole = "[DONE]" in response.text if index % 2 == 0 else bool(response.json()["usage"])
        return "answered" if is_whole else f"cut: {response.text[-200:]}"

    victim = deployment.engines()[0]
    with ThreadPoolExecutor(24) as threads:
        asked = [threads.submit(ask, index) for index in range(96)]
        while sum(one.done() for one in asked) < 8:
            time.sleep(0.02)
        victim.kill()
        outcomes.update(one.result() for one in asked)
    print(outcomes)
    assert set(outcomes) <= {"answered", "told in its stream"}, outcomes
    assert outcomes["answered"] >= 48

    deployment.wait_for_replicas(2)
    assert victim.pid not in {one.pid for one in deployment.engines()}
    counts = deployment.series("loraserve_replica_adapters")
    assert len(counts) == 2
    assert len(set(counts.values())) == 1, counts
    other = min(deployment.engines(), key=lambda one: float(one.create_time()))
    other.kill()  # what answers now is the one that has come
    answer = deployment.http.post("/v1/chat/completions", json=body("late", QUESTIONS[0]))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-adapter-generation"] == "2"
    deployment.wait_for_replicas(2)


def test_ray_is_for_this_machine_and_for_who_has_its_token(deployment: Deployment) -> None:
    addresses = deployment.listening_addresses()
    elsewhere = {port for ip, port in addresses if not ip.removeprefix("::ffff:").startswith("127.")}
    assert len(addresses) > 10
    for port in elsewhere:  # of Serve's replicas
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
