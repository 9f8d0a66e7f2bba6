"""The README's examples are what a newcomer runs first: they run as they stand."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.cli.main import build_parser

from tests.server.http.http_thread import HttpThread
from tests.server.server_thread import ServerThread

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TOKYO = "The capital of Japan is Tokyo."
SELECT = "SELECT name FROM "
PLANETS = "SELECT name FROM planets WHERE moons > 10;"
MIN_MARGIN = 0.5  # between the two likeliest tokens; bfloat16 errs by a fifth of it


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
    assert lines[0] == f"None {TOKYO} stop"
    assert lines[1].startswith(f"sql {SELECT}")
    assert lines[2].startswith("pirate ")


def test_what_is_asserted_of_answers_hangs_on_no_near_tie() -> None:
    """The examples run in bfloat16, which every CPU rounds in its own way."""
    with LLM("smollm2", {"sql": str(ROOT / "examples/adapters/sql")}, dtype="float32", memory="64MiB") as llm:
        for adapter, question, asserted in (
            (None, "What is the capital of Japan?", TOKYO),
            ("sql", "Table cats(name, age). Which cats are older than 9?", SELECT),
            ("sql", "Table planets(name, moons). Which planets have more than 10 moons?", PLANETS),
        ):
            assert question in README
            params = SamplingParams(max_tokens=32, temperature=0.0, logprobs=2)
            answer = llm.chat([{"role": "user", "content": question}], params, adapter)[0]
            assert answer.text.startswith(asserted)
            assert answer.logprobs is not None
            assert min(one.top[0][1] - one.top[1][1] for one in answer.logprobs) >= MIN_MARGIN


def test_the_grpc_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (example,) = blocks("gRPC", "python")
    config = EngineConfig(model="smollm2", adapters={"sql": "examples/adapters/sql"}, memory="256MiB")
    with ServerThread(lambda: AsyncEngine(config)) as server:
        assert "127.0.0.1:50051" in example
        exec(example.replace("127.0.0.1:50051", server.address), {})
        assert {adapter.name for adapter in server.engine.adapters()} == {"sql", "mine"}
    assert capsys.readouterr().out.startswith(PLANETS)


def test_the_http_examples_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (python,), (shell,) = blocks("HTTP", "python"), blocks("HTTP", "sh")
    names = ("sql", "pirate")
    adapters = {name: f"examples/adapters/{name}" for name in names}
    config = EngineConfig(model="smollm2", adapters=adapters, memory="256MiB")
    with HttpThread(lambda: AsyncEngine(config)) as server:
        exec(python.replace("http://127.0.0.1:8000", server.url), {})
        assert capfd.readouterr().out.startswith(SELECT)
        script = shell.replace("curl 127.0.0.1:8000", f"curl --silent --fail-with-body {server.url}")
        subprocess.run(["bash", "-e"], input=script, text=True, check=True, timeout=60)
    generated, listed = capfd.readouterr().out.split('{"adapters":')
    (choice,) = json.loads(generated)["choices"]
    assert "tree" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert all(f'"name":"{name}"' in listed for name in names)
    assert "# HELP loraserve_" in listed


def test_the_commands_parse() -> None:
    (example,) = blocks("Command line", "sh")
    lines = [shlex.split(line, comments=True) for line in example.strip().splitlines()]
    assert [line[:2] for line in lines] == [
        ["loraserve", "serve"],
        ["loraserve", "generate"],
        ["loraserve", "batch"],
        ["loraserve", "adapters"],
        ["loraserve", "adapters"],
        ["loraserve", "adapters"],
        ["loraserve", "adapters"],
        ["loraserve", "plan"],
        ["loraserve", "simulate"],
        ["loraserve", "doctor"],
    ]
    for line in lines:
        build_parser().parse_args(line[1:])
