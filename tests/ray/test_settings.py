"""What `loraserve deploy`, `serve` and the application's builder refuse before anything is started."""

from __future__ import annotations

import sys

import pytest
from loraserve.cli import main
from loraserve.settings.errors import ConfigError
from loraserve.settings.load import load_settings


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--replicas", "2"], "settings of several engines are given: `loraserve deploy` takes them"),
        (["--max-replicas", "2"], "`loraserve deploy` takes them"),
        (["--replica-cores", "2"], "`loraserve deploy` takes them"),
        (["--ray-address", "auto"], "`loraserve deploy` takes them"),
    ],
)
def test_one_server_takes_no_replicas(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "smollm2", *arguments]) == 1
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"replicas": 0}, "--replicas"),
        ({"replicas": 5000}, "--replicas"),
        ({"replica_gpus": -1}, "--replica-gpus"),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas is 2, fewer than replicas, 4"),
    ],
)
def test_wrong_numbers_are_refused(values: dict[str, int], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        load_settings({"model": "m", **values}, {})


def test_without_ray_it_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("loraserve.ray.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["deploy", "smollm2"]) == 1
    assert "Ray is not installed: pip install 'loraserve[ray]'" in capsys.readouterr().err


def test_memory_is_divided_by_who_knows_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="needs loraserve[ray]: make test-ray")
    assert main(["deploy", "smollm2", "--replicas", "2", "--http-port", "0"]) == 1
    assert "memory is auto" in capsys.readouterr().err


def test_more_cores_than_the_machine_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="needs loraserve[ray]: make test-ray")
    assert main(["deploy", "smollm2", "--memory", "1GiB", "--replica-cores", "4096"]) == 1
    assert "would have 4096 cores each alone, this machine gives" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "num_here", "is_refused"),
    [
        ({"replicas": 2, "device": "cuda"}, 1, True),
        ({"replicas": 2, "device": "cuda"}, 2, False),
        ({"replica_gpus": 2}, 1, True),
        ({"replicas": 4}, 0, False),
    ],
)
def test_gpus_that_are_not_there_are_not_waited_for(
    values: dict[str, object], num_here: int, is_refused: bool
) -> None:
    pytest.importorskip("ray", reason="needs loraserve[ray]: make test-ray")
    from loraserve.ray.deploy import check_gpus  # noqa: PLC0415 (an extra)

    settings = load_settings({"model": "m", **values}, {}).settings
    if is_refused:
        with pytest.raises(ConfigError, match=f"Ray finds {num_here} on this machine"):
            check_gpus(settings, num_here)
    else:
        check_gpus(settings, num_here)


def test_the_builder_takes_settings_by_name() -> None:
    pytest.importorskip("ray", reason="needs loraserve[ray]: make test-ray")
    from loraserve.ray.application import settings_of  # noqa: PLC0415 (an extra)

    settings = settings_of({"model": "m", "replicas": "2", "adapters": "sql=/sql", "max-num-seqs": 8})
    assert (settings.replicas, settings.max_num_seqs) == (2, 8)
    assert list(settings.adapters) == ["sql"]
    assert (settings.http_port, settings.grpc_port) == (None, None)
    assert settings_of({"model": "m", "grpc_port": 50051}).grpc_port == 50051
    with pytest.raises(ValueError, match="'replica' is no setting"):
        settings_of({"model": "m", "replica": 2})
