"""Generations over HTTP: told with each answer, pinned, shared out, gone back to by who may."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.test_shadow import wait_for
from tests.e2e.test_state_dir import serving
from tests.e2e.tiny import PROMPT

Model = tuple[Path, torch.nn.Module]


@pytest.fixture
def root(tmp_path: Path, tiny_adapters: dict[str, str]) -> Path:
    for name in ("a0", "a1", "a2"):
        shutil.copytree(tiny_adapters[name], tmp_path / "root" / name)
    return tmp_path / "root"


@pytest.fixture
def http(tiny_model: Model, root: Path) -> Iterator[httpx.Client]:
    with serving(tiny_model[0], "--adapter-root", str(root), "--keep-generations", "2") as (http, _):
        yield http


def load(http: httpx.Client, source: str, **fields: Any) -> httpx.Response:
    return http.post("/adapters", json={"name": "sql", "source": source, "replace": True, **fields})


def generation(http: httpx.Client, model: str = "sql", *, stream: bool = False) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "stream": stream}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-adapter-generation"]


def shares(answer: httpx.Response) -> dict[int, float]:
    assert answer.status_code == 200, answer.text
    return {one["number"]: one["share"] for one in answer.json()["generations"]}


def test_generations_over_http(http: httpx.Client) -> None:
    assert load(http, "a0", expected_generation=0).json()["generation"] == 1
    assert load(http, "a1", expected_generation=1).json()["generation"] == 2
    refused = load(http, "a2", expected_generation=1)
    assert (refused.status_code, "is at generation 2, 1 was expected" in refused.text) == (409, True)
    assert [generation(http), generation(http, stream=True), generation(http, "sql@1")] == ["2", "2", "1"]
    assert load(http, "a2", share=0.25).json()["generation"] == 2
    assert shares(http.get("/adapters/sql/generations")) == {1: 0.0, 2: 0.75, 3: 0.25}
    assert {generation(http) for _ in range(60)} == {"2", "3"}
    assert shares(http.put("/adapters/sql/shares", json={"shares": {"3": 1.0}})) == {1: 0.0, 2: 0.0, 3: 1.0}
    assert generation(http) == "3"
    back = http.post("/adapters/sql/rollback", json={"expected_generation": 3})
    assert shares(back) == {1: 0.0, 2: 1.0, 3: 0.0}
    assert generation(http) == "2"
    assert shares(http.post("/adapters/sql/rollback", json={"generation": 1}))[1] == 1.0
    assert [model["id"] for model in http.get("/v1/models").json()["data"][1:]] == ["sql"]


def test_a_sent_adapter_can_demand_what_is_there_and_get_a_share(http: httpx.Client, root: Path) -> None:
    load(http, "a0")
    content = (root / "a1" / "adapter_model.safetensors").read_bytes()
    config = (root / "a1" / "adapter_config.json").read_text()
    for expected, status in (("2", 409), ("1", 201)):
        query = {"config": config, "replace": "true", "expected_generation": expected, "share": "0.5"}
        assert http.put("/adapters/sql", params=query, content=content).status_code == status
    assert shares(http.get("/adapters/sql/generations")) == {1: 0.5, 2: 0.5}


def test_a_user_keeps_its_generation(http: httpx.Client) -> None:
    load(http, "a0")
    load(http, "a1", share=0.5)

    def got(user: str, field: str = "user") -> str:
        body = {"model": "sql", "max_tokens": 1, "prompt": PROMPT, field: user}
        return http.post("/v1/completions", json=body).headers["x-adapter-generation"]

    first = {user: got(user) for user in map(str, range(24))}
    assert set(first.values()) == {"1", "2"}
    assert {user: got(user) for user in first} == first
    assert {user: got(user, "safety_identifier") for user in first} == first


def test_a_shadow_is_set_told_counted_and_ended(http: httpx.Client, root: Path) -> None:
    load(http, "a0")
    assert load(http, "a1", shadow=1.0).json()["generation"] == 1
    shown = http.get("/adapters/sql/generations").json()["generations"]
    assert [(one["share"], one["kept"]) for one in shown] == [(1.0, True), (0.0, True)]
    assert shown[0]["shadow"] is None
    assert (shown[1]["shadow"]["fraction"], shown[1]["shadow"]["compared"]) == (1.0, 0)
    assert [generation(http), generation(http, stream=True)] == ["1", "1"]

    def counted() -> dict[str, float]:
        return http.get("/adapters/sql/generations").json()["generations"][1]["shadow"]

    wait_for(lambda: counted()["compared"] + counted()["dropped"] == 2)
    assert counted()["errors"] == 0
    metrics = http.get("/metrics").text
    assert f'loraserve_adapter_shadow_compared_total{{adapter="sql"}} {counted()["compared"]:.1f}' in metrics
    body = {"generation": 2, "fraction": 0.25}
    assert http.put("/adapters/sql/shadow", json=body).json()["generations"][1]["shadow"]["fraction"] == 0.25
    ended = http.delete("/adapters/sql/shadow").json()["generations"][1]["shadow"]
    assert (ended["fraction"], ended["compared"]) == (0.0, counted()["compared"])
    assert http.delete("/adapters/sql/shadow").status_code == 404
    content = (root / "a2" / "adapter_model.safetensors").read_bytes()
    query = {"config": (root / "a2" / "adapter_config.json").read_text(), "replace": "true", "shadow": "0.5"}
    sent = http.put("/adapters/sql", params=query, content=content)
    assert (sent.status_code, sent.json().get("generation")) == (201, 1), sent.text
    shown = http.get("/adapters/sql/generations").json()["generations"]
    assert [one["shadow"] and one["shadow"]["fraction"] for one in shown] == [None, 0.0, 0.5]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/adapters/none/shadow", {"generation": 1, "fraction": 0.5}, 404),
        ("PUT", "/adapters/sql/shadow", {"generation": 1, "fraction": 0.5}, 400),
        ("PUT", "/adapters/sql/shadow", {"generation": 2, "fraction": 0.5}, 404),
        ("PUT", "/adapters/sql/shadow", {"generation": 1, "fraction": 0}, 400),
        ("PUT", "/adapters/sql/shadow", {"generation": 1}, 400),
        ("DELETE", "/adapters/sql/shadow", None, 404),
        ("POST", "/adapters", {"name": "new", "source": "a1", "shadow": 0.5}, 400),
        ("POST", "/adapters/none/rollback", {}, 404),
        ("POST", "/adapters/sql/rollback", {}, 404),
        ("POST", "/adapters/sql/rollback", {"generation": 9}, 404),
        ("POST", "/adapters/sql/rollback", {"expected_generation": 9}, 409),
        ("PUT", "/adapters/sql/shares", {"shares": {"1": 0.5}}, 400),
        ("PUT", "/adapters/sql/shares", {"shares": {"1": 2}}, 400),
        ("PUT", "/adapters/sql/shares", {"shares": {"x": 1}}, 400),
        ("PUT", "/adapters/sql/shares", {"shares": {}}, 400),
        ("PUT", "/adapters/sql/shares", {"shares": {"9": 1}}, 404),
        ("GET", "/adapters/none/generations", None, 404),
        ("DELETE", "/adapters/sql@1", None, 400),
    ],
)
def test_what_can_not_be_is_refused(
    http: httpx.Client, method: str, path: str, body: Any, status: int
) -> None:
    load(http, "a0")
    answer = http.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    assert generation(http) == "1"


def test_who_may_use_an_adapter_may_use_its_generations_and_no_others(
    tiny_model: Model, root: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "- {name: one, secret: of-one, adapters: [sql]}\n- {name: other, secret: of-other, adapters: [x]}\n"
    )
    options = ["--adapter", f"sql={root / 'a0'}", "--keys-file", str(keys)]
    with serving(tiny_model[0], *options) as (http, _):
        for secret, status in (("of-one", 200), ("of-other", 403)):
            http.headers["authorization"] = f"Bearer {secret}"
            for model in ("sql", "sql@1"):
                body = {"model": model, "prompt": PROMPT, "max_tokens": 1}
                assert http.post("/v1/completions", json=body).status_code == status
            assert http.get("/adapters/sql/generations").status_code == status
            assert http.post("/adapters/sql/rollback", json={}).status_code == 403
        assert http.put("/adapters/sql/shares", json={"shares": {"1": 1}}).status_code == 403
        assert http.put("/adapters/sql/shadow", json={"generation": 1, "fraction": 1}).status_code == 403
        assert http.delete("/adapters/sql/shadow").status_code == 403


def test_the_next_start_goes_on_with_numbers_shares_and_shadow(
    tiny_model: Model, tiny_adapters: dict[str, str], root: Path, tmp_path: Path
) -> None:
    options = ["--adapter-root", str(root), "--state-dir", str(tmp_path / "state"), "--keep-generations", "1"]
    shutil.copytree(tiny_adapters["a3"], root / "old")

    def told(http: httpx.Client) -> list[tuple[Any, ...]]:
        shown = http.get("/adapters/sql/generations").json()["generations"]
        fields = ("number", "current", "kept", "share", "hash", "source", "since")
        shadows = [one["shadow"] and one["shadow"]["fraction"] for one in shown]
        return [
            (*(one[name] for name in fields), shadow or 0.0)
            for one, shadow in zip(shown, shadows, strict=True)
        ]

    with serving(tiny_model[0], *options) as (http, _):
        load(http, "old")
        load(http, "a0", manifest={"stop": [";"]}, weight=2)
        load(http, "a1", share=0.25)
        content = (root / "a2" / "adapter_model.safetensors").read_bytes()
        config = (root / "a2" / "adapter_config.json").read_text()
        query = {"config": config, "replace": "true", "shadow": "0.5"}
        assert http.put("/adapters/sql", params=query, content=content).status_code == 201
        assert http.put("/adapters/sql/shadow", json={"generation": 1, "fraction": 0.125}).status_code == 200
        before = told(http)
        assert [(one[0], one[3], one[-1]) for one in before] == [
            (1, 0.0, 0.125),
            (2, 0.75, 0.0),
            (3, 0.25, 0.0),
            (4, 0.0, 0.0),
        ]
    for _ in range(2):
        with serving(tiny_model[0], *options) as (http, _):
            gone = [*before[:3], (*before[3][:2], False, *before[3][3:])]  # what was sent is remembered only
            assert told(http) == gone
            assert http.get("/adapters/sql").json()["weight"] == 2.0
            assert {generation(http) for _ in range(40)} == {"2", "3"}
            assert generation(http, "sql@1") == "1"
    shutil.rmtree(root / "a1")
    (root / "old" / "adapter_config.json").write_text((root / "a2" / "adapter_config.json").read_text())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(root / "a2" / file, root / "old" / file)
    with serving(tiny_model[0], *options) as (http, _):
        assert [(one[0], one[2], one[3], one[-1]) for one in told(http)] == [
            (1, False, 0.0, 0.0),
            (2, True, 1.0, 0.0),
            (3, False, 0.0, 0.0),
            (4, False, 0.0, 0.0),
        ]
        assert load(http, "a2").json()["generation"] == 5
        assert http.post("/adapters/sql/rollback", json={}).status_code == 200
    with serving(tiny_model[0], *options) as (http, _):
        assert [(one[0], one[1], one[2]) for one in told(http)][1:] == [
            (2, True, True),
            (3, False, False),
            (4, False, False),
            (5, False, True),
        ]
        assert http.delete("/adapters/sql").status_code == 204
    with serving(tiny_model[0], *options) as (http, _):
        assert http.get("/adapters").json()["adapters"] == []
        assert load(http, "a2").json()["generation"] == 6


def test_configured_adapters_keep_their_numbers(tiny_model: Model, root: Path, tmp_path: Path) -> None:
    state = ["--adapter-root", str(root), "--state-dir", str(tmp_path / "state")]
    for name, number in (("a0", 1), ("a1", 4), ("a1", 4), ("a2", 3)):
        with serving(tiny_model[0], "--adapter", f"sql={root / name}", *state) as (http, _):
            assert http.get("/adapters/sql").json()["generation"] == number
            if name == "a0":
                assert load(http, "a1").json()["generation"] == 2
                assert load(http, "a2", share=0.5).json()["generation"] == 2
                assert load(http, "a1", replace=True).json()["generation"] == 2
                assert http.post("/adapters/sql/rollback", json={"generation": 1}).status_code == 200
                assert load(http, "a1").json()["generation"] == 4
                assert shares(http.get("/adapters/sql/generations"))[4] == 1.0
            else:
                assert len(shares(http.get("/adapters/sql/generations"))) == 4


def test_the_next_start_loads_what_was_gone_back_to(tiny_model: Model, root: Path, tmp_path: Path) -> None:
    options = ["--adapter-root", str(root), "--state-dir", str(tmp_path / "state")]

    def path(http: httpx.Client) -> str:
        (adapter,) = http.get("/adapters").json()["adapters"]
        return Path(adapter["path"]).name

    with serving(tiny_model[0], *options) as (http, _):
        load(http, "a0")
        load(http, "a1")
        load(http, "a2", share=0.5)
        assert path(http) == "a1"
    with serving(tiny_model[0], *options) as (http, _):
        assert path(http) == "a1"
        load(http, "a2")
        assert http.post("/adapters/sql/rollback", json={}).status_code == 200
    with serving(tiny_model[0], *options) as (http, _):
        assert path(http) == "a1"
