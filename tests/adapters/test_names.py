"""Names that no request could ask for, or that mean something else, are refused: at start and at run time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from loraserve import AsyncEngine, EngineConfig
from loraserve.adapters.registry import check_adapter_name, check_base_names
from loraserve.client import Client
from loraserve.errors import InvalidRequestError

from tests.server.control_server import ControlServer

BASE_NAMES = ("base", "org/alias")

TAKEN = [
    ("base", "is the base model's already"),
    ("base:x", "means adapter 'x' of base model 'base' already"),
    ("base:", "means adapter '' of base model 'base' already"),
    ("base:a:b", "means adapter 'a:b' of base model 'base' already"),
    ("org-alias", "is the base model's already"),
    ("org-alias:x", "means adapter 'x' of base model 'org-alias' already"),
    ("__base_model__", "LoRAX' name of the base model"),
    ("_sum", "metrics"),
    ("_other", "metrics"),
    (".", "no URL"),
    ("..", "no URL"),
]
FREE = ["x", "base2", "bas", "x:base", "base-x", "base.x", "Base", "alias", "org", "...", "_sum2", "a:b"]


@pytest.mark.parametrize(("name", "reason"), TAKEN)
def test_a_name_that_means_something_else_is_refused(name: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        check_adapter_name(name, BASE_NAMES)


@pytest.mark.parametrize("name", FREE)
def test_a_name_that_is_free_may_be_given(name: str) -> None:
    check_adapter_name(name, BASE_NAMES)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("a", "a"), "'a' twice"),
        (("a", ""), "is empty"),
        (("a", "a:x"), "means adapter 'x' of base model 'a'"),
        (("a:x", "a"), "means adapter 'x' of base model 'a'"),
    ],
)
def test_names_of_the_base_model_mean_it_alone(names: tuple[str, ...], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        check_base_names(names)
    check_base_names(("a", "b", "ab:x", "a/b"))


@pytest.fixture(scope="module")
def server(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> Iterator[ControlServer]:
    config = EngineConfig(
        model=str(tiny_model[0]),
        adapters={"x": tiny_adapters["a0"]},
        base_names=BASE_NAMES,
        dtype="float32",
        memory="8MiB",
    )
    roots = [Path(tiny_adapters["a1"]).parent]
    with ControlServer(lambda: AsyncEngine(config), roots=roots) as server:
        yield server


@pytest.mark.parametrize(("name", "reason"), TAKEN)
def test_no_route_loads_an_adapter_under_a_taken_name(
    server: ControlServer, tiny_adapters: dict[str, str], name: str, reason: str
) -> None:
    path = tiny_adapters["a1"]
    with httpx.Client(base_url=server.url, timeout=30.0) as http:
        for route, body in (
            ("/adapters", {"name": name, "source": path}),
            ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}),
            ("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, "load_inplace": True}),
        ):
            answer = http.post(route, json=body)
            assert answer.status_code == 400
            assert reason in answer.text
        with (
            Client(server.grpc_address, timeout=30.0) as client,
            pytest.raises(InvalidRequestError, match=reason),
        ):
            client.load_adapter(name, path)
        listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert listed == ["base", "x"]
