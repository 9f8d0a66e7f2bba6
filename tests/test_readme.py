"""The README's examples are what a newcomer runs first: they run as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from loraserve import AsyncEngine, EngineConfig
from loraserve.cli.main import build_parser

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
