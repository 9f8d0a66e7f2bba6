"""Adapters that can't be served at start: all are named at once, or left out and reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve import LLM, SamplingParams
from loraserve.adapters.startup import AdapterFailure
from loraserve.errors import AdapterFormatError, LoraserveError
from loraserve.server import assembly
from loraserve.settings.entries import ApiKey
from loraserve.settings.load import load_settings

from tests.server.control_server import ControlEngine, ControlServer

SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "memory": "16MiB", "num_threads": 1}


def _with_dora(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


BREAKS: dict[str, Callable[[Path], object]] = {
    "dora": _with_dora,
    "empty": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "gone": shutil.rmtree,
    "no-config": lambda folder: (folder / "adapter_config.json").unlink(),
}


@pytest.fixture
def adapters(tiny_adapters: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A good one, then one broken in each way, then a good one again."""
    good = next(iter(tiny_adapters.values()))
    broken = {name: str(shutil.copytree(good, tmp_path / name)) for name in BREAKS}
    for name, damage in BREAKS.items():
        damage(Path(broken[name]))
    return {"first": good, **broken, "last": good}


def test_every_broken_adapter_is_named_with_its_path(
    tiny_model: tuple[Path, torch.nn.Module], adapters: dict[str, str]
) -> None:
    with pytest.raises(LoraserveError) as caught:
        LLM(str(tiny_model[0]), adapters, **SETTINGS)
    first, *lines = str(caught.value).split("\n")
    assert first == "4 adapters can't be served, mend them or start with on_adapter_error=skip"
    assert [line.split(": ")[0] for line in lines] == [
        f"adapter {name!r} of {adapters[name]}" for name in BREAKS
    ]


@pytest.mark.parametrize("name", BREAKS)
def test_one_broken_adapter_keeps_the_class_of_its_error(
    tiny_model: tuple[Path, torch.nn.Module], adapters: dict[str, str], name: str
) -> None:
    with pytest.raises(AdapterFormatError) as caught:
        LLM(str(tiny_model[0]), {name: adapters[name]}, **SETTINGS)
    assert str(caught.value).startswith(f"adapter {name!r} of {adapters[name]}: ")


def test_a_rank_over_the_limit_names_its_adapter(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    name, path = next(iter(tiny_adapters.items()))
    with pytest.raises(LoraserveError, match=f"^adapter '{name}' of {path}: .*rank"):
        LLM(str(tiny_model[0]), {name: path}, max_lora_rank=1, **SETTINGS)


def test_the_others_are_served_without_the_broken_ones(
    tiny_model: tuple[Path, torch.nn.Module], adapters: dict[str, str]
) -> None:
    with LLM(str(tiny_model[0]), adapters, on_adapter_error="skip", **SETTINGS) as llm:
        assert [adapter.name for adapter in llm.adapters()] == ["first", "last"]
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        first, last = llm.generate(["Once", "Once"], params, adapter=["first", "last"])
        assert first.token_ids == last.token_ids


def test_manifests_and_downloads_that_fail_count_as_well(
    monkeypatch: pytest.MonkeyPatch, tiny_adapters: dict[str, str]
) -> None:
    def download(repo: str, revision: str | None) -> Path:
        raise AdapterFormatError(f"no repository {repo}")

    monkeypatch.setattr(assembly, "download_adapter", download)
    good = next(iter(tiny_adapters.values()))
    given = {
        "good": {"path": good},
        "missing": {"repo": "org/missing"},
        "odd": {"path": good, "manifest": {"colour": "red"}},
    }
    config = assembly.engine_config(load_settings({"model": "m", "adapters": given}, {}).settings)
    assert config.adapters == {"good": good}
    assert [(failure.name, failure.source) for failure in config.failed_adapters] == [
        ("missing", "org/missing"),
        ("odd", good),
    ]


KEYS = [
    ApiKey(name="sales", secret="sales-key", adapters=("sql*", "gone")),
    ApiKey(name="root", secret="root-key", is_admin=True),
]
FAILURES = (
    AdapterFailure("gone", "/adapters/gone", AdapterFormatError("/adapters/gone is empty\n")),
    AdapterFailure("hidden", "org/hidden", AdapterFormatError("no such repository")),
    AdapterFailure("sql", "/adapters/old", AdapterFormatError("was broken, is loaded again since")),
)


def test_what_is_missing_is_reported_as_far_as_the_caller_may_know() -> None:
    with (
        ControlServer(lambda: ControlEngine("sql"), keys=KEYS, adapter_failures=FAILURES) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        ready = client.get("/ready")
        assert (ready.status_code, ready.json()) == (200, {"num_failed_adapters": 2})
        seen = {
            name: client.get("/adapters", headers={"authorization": f"Bearer {name}-key"}).json()["failed"]
            for name in ("sales", "root")
        }
    assert seen["sales"] == [{"name": "gone", "source": None, "error": None}]
    assert seen["root"] == [
        {"name": "gone", "source": "/adapters/gone", "error": "/adapters/gone is empty\\n"},
        {"name": "hidden", "source": "org/hidden", "error": "no such repository"},
    ]
