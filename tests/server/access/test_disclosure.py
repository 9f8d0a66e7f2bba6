"""A key sees its own requests; load, what others do and the machine's files are for the operator to see."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from loraserve.adapters.source import AdapterSource
from loraserve.client import Client
from loraserve.engine.stats import EngineInfo
from loraserve.errors import AdapterUnavailableError, LoraserveError, PermissionDeniedError
from loraserve.server.access.disclosure import shown_error
from loraserve.server.access.keys import AccessControl
from loraserve.server.adapters import sources as module
from loraserve.server.assembly import access_control, adapter_sources
from loraserve.settings.entries import ApiKey
from loraserve.settings.load import load_settings

from tests.server.control_server import ControlEngine, ControlServer

KEYS = [
    ApiKey(name="sales", secret="sales-key", adapters=("sql*",)),
    ApiKey(name="root", secret="root-key", is_admin=True),
]
PLACES = ("/srv/models/llama", "/adapters/")


class PlacedEngine(ControlEngine):
    """Its model lies in a directory, and it is busy."""

    def info(self) -> EngineInfo:
        return EngineInfo(
            **vars(super().info()) | {"model": PLACES[0], "num_running": 7, "num_cached_pages": 4}
        )


@pytest.fixture(scope="module")
def server() -> Iterator[ControlServer]:
    with ControlServer(lambda: PlacedEngine("sql", "law"), keys=KEYS) as server:
        yield server


def get(server: ControlServer, path: str, key: str | None) -> Any:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    answer = httpx.get(f"{server.url}{path}", headers=headers, timeout=10.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


ROUTES = ["/info", "/adapters", "/adapters/sql", "/v1/models", "/v1/models/sql", "/dashboard/stats"]


@pytest.mark.parametrize("path", ROUTES)
def test_no_route_tells_a_key_where_files_lie_or_what_others_do(server: ControlServer, path: str) -> None:
    before = json.dumps(get(server, path, "sales-key"))
    assert not any(place in before for place in PLACES)
    assert "law" not in before
    engine = server.engine
    paths, usage = dict(engine.paths), engine.usage
    try:
        # Another caller is active: what is answered to this key must not move.
        engine.paths["other"] = "/adapters/other"
        engine.resident.update(("sql", "law"))
        engine.pinned.add("sql")
        engine.usage = type(usage)(**{name: value + 5 for name, value in asdict(usage).items()})
        assert json.dumps(get(server, path, "sales-key")) == before
        seen = json.dumps(get(server, path, "root-key"))
    finally:
        engine.paths, engine.usage = paths, usage
        engine.resident.clear()
        engine.pinned.clear()
    assert seen != before


def test_grpc_tells_a_key_no_more(server: ControlServer) -> None:
    with (
        Client(server.grpc_address, timeout=10.0, api_key="sales-key") as sales,
        Client(server.grpc_address, timeout=10.0, api_key="root-key") as root,
    ):
        info, adapters = MessageToDict(sales.info()), [MessageToDict(one) for one in sales.adapters()]
        assert set(info) == {
            "version",
            "dtype",
            "quantization",
            "adapterDtype",
            "device",
            "maxModelLen",
            "maxLoraRank",
        }
        assert [set(adapter) for adapter in adapters] == [{"name", "generation", "receipt"}]
        assert root.info().num_running == 7
        assert root.info().model == PLACES[0]
        assert [(one.name, one.path, one.num_waiting) for one in root.adapters()] == [
            ("law", "/adapters/law", 2),
            ("sql", "/adapters/sql", 2),
        ]


def test_an_administrator_sees_roots_and_load(server: ControlServer) -> None:
    models = {model["id"]: model["root"] for model in get(server, "/v1/models", "root-key")["data"]}
    assert models == {"base": PLACES[0], "sql": "/adapters/sql", "law": "/adapters/law"}
    assert {model["root"] for model in get(server, "/v1/models", "sales-key")["data"]} == {None}
    info = get(server, "/info", "root-key")
    assert (info["model"], info["num_running"], info["num_cached_pages"]) == (PLACES[0], 7, 4)


def test_tgis_fields_and_limits_are_for_every_key(server: ControlServer) -> None:
    info = get(server, "/info", "sales-key")
    expected = {"model_id": "base", "max_total_tokens": 1024, "max_model_len": 1024, "device": "cpu"}
    assert {name: info[name] for name in expected} == expected
    hidden = {name for name in info if name.startswith("num_") or "page" in name}
    assert hidden == set()


def test_without_keys_load_is_everybodys_and_paths_are_this_machines() -> None:
    access = AccessControl.open()
    near, far = (access.authenticate(None, client_host=host) for host in ("127.0.0.1", "192.0.2.1"))
    assert (near.sees_load, near.sees_paths) == (True, True)
    assert (far.sees_load, far.sees_paths) == (True, False)


@pytest.mark.parametrize("secret", ["sales-key", "root-key"])
def test_why_an_adapter_failed_to_load_is_the_operators(secret: str) -> None:
    caller = AccessControl(KEYS).authenticate(f"Bearer {secret}", client_host="")
    failed = AdapterUnavailableError("/adapters/sql/adapter_model.safetensors can't be read")
    shown, other = shown_error(failed, caller), LoraserveError("other")
    assert ("/adapters" in str(shown)) == caller.is_admin
    assert isinstance(shown, AdapterUnavailableError)
    assert shown_error(other, caller) is other


@pytest.mark.parametrize("path", ["/v1/completions", "/generate", "/generate_stream"])
def test_an_answer_that_fails_over_an_adapter_names_no_file(server: ControlServer, path: str) -> None:
    bodies = {"/v1/completions": {"prompt": "late AdapterFormatError", "model": "sql"}}
    tgi = {"inputs": "late AdapterFormatError", "parameters": {"adapter_id": "sql"}}
    for key, is_shown in (("sales-key", False), ("root-key", True)):
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(f"{server.url}{path}", json=bodies.get(path, tgi), headers=headers, timeout=10.0)
        assert ("text of AdapterFormatError" in answer.text) == is_shown
        assert ("can't be loaded now" in answer.text) != is_shown


def test_grpc_names_no_file_either(server: ControlServer) -> None:
    with (
        Client(server.grpc_address, timeout=10.0, api_key="sales-key") as sales,
        pytest.raises(AdapterUnavailableError, match="can't be loaded now"),
    ):
        sales.generate("late AdapterFormatError", adapter="sql")


@pytest.mark.parametrize(
    ("values", "is_open"),
    [
        ({}, True),
        ({"hub_repo": ["org/*"]}, True),
        ({"hub_repo": ["other/*"]}, False),
        ({"hub_repo": []}, False),
        ({"api_key": "k"}, False),
        ({"admin_key": "k"}, False),
        ({"admin_key": "k", "hub_repo": ["org/*"]}, True),
    ],
)
def test_the_hub_is_closed_where_there_are_keys_unless_opened(
    values: dict[str, Any], is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "download_adapter", lambda repo, *_: Path("/cache") / repo)
    settings = load_settings({"model": "m", **values}, {}).settings
    sources = adapter_sources(settings, access_control(settings))
    wanted = AdapterSource("hub", "org/name")
    if is_open:
        assert asyncio.run(sources.resolve(wanted)) == Path("/cache/org/name")
        return
    with pytest.raises(PermissionDeniedError, match="--hub-repo"):
        asyncio.run(sources.resolve(wanted))
