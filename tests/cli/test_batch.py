"""`loraserve batch`: on a tiny model, killed at any moment, by a server, on a disk that is full."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loraserve.cli import main
from loraserve.settings.entries import ApiKey

from tests.server.batches.inputs import line, results_of
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

NUM_LINES = 400
ADAPTERS = ("a0", "a1")


@pytest.fixture(scope="module")
def engine(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> list[str]:
    """Options of a model with two adapters, called tiny."""
    named = [option for name in ADAPTERS for option in ("--adapter", f"{name}={tiny_adapters[name]}")]
    options = ["--served-model-name", "tiny", "--dtype", "float32", "--memory", "8MiB", "--threads", "1"]
    return ["--model", str(tiny_model[0]), *named, *options]


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines with the base model and adapters, some of them wrong."""
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    names = ["tiny", *ADAPTERS]
    lines = [
        line(f"r{index}", f"item {index}", model=names[index % 3], max_tokens=24, temperature=0)
        for index in range(NUM_LINES)
    ]
    lines[7], lines[9], lines[11] = b"nonsense", line("r9", "x", model="none"), line("r8")
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.fixture(scope="module")
def unbroken(requests: Path, engine: list[str]) -> dict[str, Any]:
    """Results of a run that nothing ended, by id."""
    output = requests.with_name("unbroken.jsonl")
    assert main(["batch", str(requests), "-o", str(output), *engine, "--quiet"]) == 3
    return by_id(output)


def by_id(path: Path) -> dict[str, Any]:
    """What is told of each line, without what changes from run to run; every line once."""
    results = results_of(path)
    found: dict[str, Any] = {}
    for one in results:
        response = one["response"]
        told = one["error"] if response is None else response["body"].get("choices", response["body"])
        found[one["id"]] = (one["custom_id"], told)
    assert len(found) == len(results)
    return found


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loraserve", "batch", *arguments]


def test_results_are_those_of_the_requests(unbroken: dict[str, Any]) -> None:
    assert len(unbroken) == NUM_LINES
    failed = [told for _, told in unbroken.values() if isinstance(told, dict)]
    assert len(failed) == 3
    ids = [custom_id for custom_id, _ in unbroken.values()]
    assert {*ids} == {None, *(f"r{index}" for index in range(NUM_LINES))} - {"r7", "r11"}


def test_a_run_killed_at_random_moments_goes_on_to_the_same_results(
    requests: Path, engine: list[str], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = command(str(requests), "-o", str(output), *engine, "--concurrency", "2")
    draw, grown = random.Random(3), []
    for _ in range(3):
        begun = output.stat().st_size if output.exists() else 0
        with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while (output.stat().st_size if output.exists() else 0) <= begun and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.2))
            process.kill()
        grown.append(output.read_bytes().count(b"\n"))
    assert grown == sorted(grown)
    assert 0 < grown[0] < NUM_LINES
    output.write_bytes(output.read_bytes()[:-3])
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert by_id(output) == unbroken
    assert f"{NUM_LINES} lines done: {NUM_LINES - 3} answered, 3 failed" in done.stderr
    assert "of them before" in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_run_that_goes_on_later(
    requests: Path, engine: list[str], unbroken: dict[str, Any], tmp_path: Path, number: int, status: int
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = command(str(requests), "-o", str(output), *engine, "--concurrency", "1")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        while not output.exists() or not output.stat().st_size:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    assert process.returncode == status, error
    assert "the same command goes on" in error
    assert "Traceback" not in error
    assert 0 < len(results_of(output)) < NUM_LINES
    assert main(["batch", str(requests), "-o", str(output), *engine, "--quiet"]) == 3
    assert by_id(output) == unbroken


def test_a_full_disk_ends_the_run_which_goes_on_where_there_is_room(
    requests: Path, engine: list[str], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    limit = 20_000

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command(str(requests), "-o", str(output), *engine),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=bound,
    )
    assert done.returncode == 1
    assert f"{output} can't be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert limit - 2000 < output.stat().st_size <= limit
    assert output.read_bytes().endswith(b"\n")
    assert main(["batch", str(requests), "-o", str(output), *engine, "--quiet"]) == 3
    assert by_id(output) == unbroken


def test_stdin_and_stdout_are_files_too(
    requests: Path, engine: list[str], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with requests.open("rb") as stdin, output.open("wb") as stdout:
        done = subprocess.run(
            command("-", "-o", "-", *engine), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 3
    assert by_id(output) == unbroken


def test_an_output_of_another_input_is_left_alone_unless_told(
    engine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(line("1", model="tiny", max_tokens=1))
    arguments = ["batch", str(source), "-o", str(output), *engine]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert len(results_of(output)) == 1
    source.write_bytes(line("2", model="tiny", max_tokens=1))
    assert main(arguments) == 1
    assert "has results of another input" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert [one["custom_id"] for one in results_of(output)] == ["2"]


def test_nothing_is_done_in_no_time(engine: list[str], tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n\n")
    assert main(["batch", str(source), "-o", str(tmp_path / "out"), *engine]) == 0
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["in"], "required: -o/--output"),
        (["in", "-o", "out"], "one of the arguments --model --url is required"),
        (["in", "-o", "out", "--model", "m", "--url", "u"], "not allowed with"),
        (["in", "-o", "out", "--url", "u", "--memory", "1GiB"], "--memory is of a model in this process"),
        (["in", "-o", "out", "--url", "u", "--adapter", "a=b"], "--adapter is of a model in this process"),
        (["in", "-o", "out", "--model", "m", "--api-key-env", "K"], "--api-key-env is for --url"),
        (["in", "-o", "out", "--model", "m", "--concurrency", "0"], "it must be from 1 to"),
        ([__file__, "-o", __file__, "--model", "m"], "are the same file"),
    ],
)
def test_options_that_contradict_are_refused(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["batch", *options])
    assert left.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["none", "-o", "out", "--model", "m"], "none can't be read: No such file or directory"),
        (["/dev/null", "-o", "out", "--model", "m"], "/dev/null can't be read: it is no file"),
        (["in", "-o", "none/out", "--model", "m"], "none/out can't be opened"),
        (["in", "-o", "out", "--model", "none"], "none"),
        (["in", "-o", "out", "--url", "ftp://x"], "--url is 'ftp://x'"),
        (["in", "-o", "out", "--url", "http://127.0.0.1:9"], "can't be reached: Connection refused"),
        (["in", "-o", "out", "--url", "http://127.0.0.1:9", "--api-key-env", "NO_KEY"], "NO_KEY"),
    ],
)
def test_what_can_t_be_used_is_one_line(
    options: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").write_bytes(line("1"))
    assert main(["batch", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("loraserve: error: ")
    assert text in error


@contextlib.contextmanager
def served(**options: Any) -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, **options) as server:
        yield server


def test_a_server_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    lines = [line(str(index), f"x {index}") for index in range(500)]
    source.write_bytes(b"\n".join([*lines, line("late", "late NotFiniteError"), b"{}"]))
    monkeypatch.setenv("MY_KEY", "secret")
    with served(keys=[ApiKey(name="k", secret="secret", max_concurrent=12)]) as server:
        for base in (server.url, f"{server.url}/v1"):
            arguments = ["batch", str(source), "-o", str(output), "--url", base, "--overwrite"]
            assert main([*arguments, "--api-key-env", "MY_KEY", "--concurrency", "8"]) == 3
            found = {one["custom_id"]: one["response"] for one in results_of(output)}
            assert len(found) == 502
            assert found["7"]["body"]["choices"][0]["text"] == "x7"
            assert found["late"]["status_code"] == 500
            assert found[None] is None
        monkeypatch.setenv("MY_KEY", "wrong")
        assert main([*arguments, "--api-key-env", "MY_KEY"]) == 1


def test_a_server_that_is_away_for_a_while_is_waited_for(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"\n".join(line(str(index), f"x {index}") for index in range(20)))
    script = (
        "import http.server, json, os, sys, time\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    count = 0\n"
        "    def do_GET(self): self.reply(200)\n"
        "    def do_POST(self):\n"
        "        self.rfile.read(int(self.headers['content-length']))\n"
        "        H.count += 1\n"
        "        if H.count % 5 == 3: self.connection.close()\n"
        "        else: self.reply(503 if H.count % 5 == 1 else 200)\n"
        "    def reply(self, status):\n"
        "        self.send_response(status); body = b'{\"n\":\\n1}'\n"
        "        self.send_header('retry-after', '0'); self.send_header('content-length', str(len(body)))\n"
        "        self.end_headers(); self.wfile.write(body)\n"
        "    def log_message(self, *_): pass\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), H); print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        try:
            url = f"http://127.0.0.1:{port}"
            assert main(["batch", str(source), "-o", str(output), "--url", url, "--concurrency", "2"]) == 0
        finally:
            process.kill()
    assert {one["custom_id"] for one in results_of(output)} == {str(index) for index in range(20)}
    assert results_of(output)[0]["response"]["body"] == {"n": 1}


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "--help"])
    text = capsys.readouterr().out
    example = text.split("(on one line)")[0].split("base model or an adapter:")[1]
    assert json.loads(example)["url"] == "/v1/chat/completions"
    assert os.linesep in text
