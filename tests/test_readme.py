"""The README's examples are what a newcomer runs first: they run as they stand."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from loraserve import AsyncEngine, EngineConfig
from loraserve.cli.main import build_parser

from tests.server.http.http_thread import HttpThread
from tests.server.server_thread import ServerThread

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(section: str, language: str) -> list[str]:
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = blocks("Python", "python")
    names: dict[str, object] = {}
    exec(example, names)
    names["llm"].close()  # type: ignore[attr-defined]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" Paris")
    assert any(line.startswith("sql SELECT") for line in lines)


def test_the_grpc_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = blocks("gRPC", "python")
    config = EngineConfig(model="smollm2", adapters={"sql": "examples/adapters/sql"}, memory="256MiB")
    with ServerThread(lambda: AsyncEngine(config)) as server:
        assert "127.0.0.1:50051" in example
        exec(example.replace("127.0.0.1:50051", server.address), {})
        assert {adapter.name for adapter in server.engine.adapters()} == {"sql", "mine"}
    assert capsys.readouterr().out.startswith("SELECT name FROM planets")


def test_the_http_examples_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (python,), (shell,) = blocks("HTTP", "python"), blocks("HTTP", "sh")
    names = ("sql", "pirate")
    adapters = {name: f"examples/adapters/{name}" for name in names}
    config = EngineConfig(model="smollm2", adapters=adapters, memory="256MiB")
    with HttpThread(lambda: AsyncEngine(config)) as server:
        exec(python.replace("http://127.0.0.1:8000", server.url), {})
        assert capfd.readouterr().out.startswith("SELECT")
        script = shell.replace("curl 127.0.0.1:8000", f"curl --silent --fail-with-body {server.url}")
        subprocess.run(["bash", "-e"], input=script, text=True, check=True, timeout=60)
    generated, listed = capfd.readouterr().out.split('{"adapters":')
    assert "generated_text" in generated
    assert all(f'"name":"{name}"' in listed for name in names)
    assert "# HELP loraserve_" in listed


def test_the_commands_parse() -> None:
    (example,) = blocks("Command line", "sh")
    lines = [shlex.split(line, comments=True) for line in example.strip().splitlines()]
    assert [line[:2] for line in lines] == [
        ["loraserve", "serve"],
        ["loraserve", "generate"],
        ["loraserve", "adapters"],
        ["loraserve", "doctor"],
    ]
    for line in lines:
        build_parser().parse_args(line[1:])
