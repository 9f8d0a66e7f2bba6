"""Batches of a server that is killed and stopped at any moment, on a tiny model."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from tests.server.batches.inputs import line

NUM_LINES = 300


def command(model: Path, adapters: dict[str, str], *options: str) -> list[str]:
    named = [option for name in ("a0", "a1") for option in ("--adapter", f"{name}={adapters[name]}")]
    engine = ["--device", "cpu", "--dtype", "float32", "--memory", "16MiB", "--threads", "1"]
    server = [
        "--grpc-port",
        "off",
        "--http-port",
        "0",
        "--served-model-name",
        "base",
        "--drain-seconds",
        "30",
    ]
    return [sys.executable, "-m", "loraserve", "serve", str(model), *named, *engine, *server, *options]


@contextlib.contextmanager
def serving(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], OpenAI]]:
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split("http ")[1].split(",")[0]
            with OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
                yield process, client
        finally:
            process.kill()


def requests() -> bytes:
    names = ["base", "a0", "a1", "none"]
    return b"\n".join(
        line(f"r{index}", f"item {index}", model=names[index % 4], max_tokens=24, temperature=0)
        for index in range(NUM_LINES)
    )


def progress(client: OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed + counts.failed


def wait_for_more(client: OpenAI, batch_id: str, than: int) -> int:
    deadline = time.monotonic() + 60
    while (done := progress(client, batch_id)) <= than:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return done


def outcome(client: OpenAI, batch_id: str) -> dict[str, Any]:
    """custom_id → choices or error, of a batch that is waited for; every line once."""
    deadline = time.monotonic() + 120
    while (batch := client.batches.retrieve(batch_id)).status != "completed":
        assert batch.status in ("validating", "in_progress", "finalizing"), batch
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found: dict[str, Any] = {}
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id is not None
        for text in client.files.content(file_id).text.splitlines():
            one = json.loads(text)
            assert one["custom_id"] not in found
            body = one["response"]["body"]
            found[one["custom_id"]] = body.get("choices", body)
    assert len(found) == NUM_LINES
    return found


def begin(client: OpenAI) -> str:
    file = client.files.create(file=("in.jsonl", requests()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    return batch.id


def test_a_batch_goes_on_after_kills_and_stops_to_the_results_of_an_unbroken_one(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], tmp_path: Path
) -> None:
    options = ["--batch-dir", str(tmp_path / "batches"), "--batch-max-num-seqs", "2"]
    arguments = command(tiny_model[0], tiny_adapters, *options)
    draw, done = random.Random(5), 0
    with serving(arguments) as (process, client):
        batch_id = begin(client)
        wait_for_more(client, batch_id, done)
        process.kill()
    for number in (signal.SIGKILL, signal.SIGTERM):
        with serving(arguments) as (process, client):
            assert client.batches.retrieve(batch_id).status in ("validating", "in_progress")
            done = wait_for_more(client, batch_id, done)
            time.sleep(draw.uniform(0, 0.1))
            began = time.monotonic()
            process.send_signal(number)
            process.wait(20)
            if number == signal.SIGTERM:
                assert process.returncode == 0
                assert time.monotonic() - began < 10  # the drain does not wait for lines
    with serving(arguments) as (_, client):
        before = progress(client, batch_id)
        assert before < NUM_LINES
        assert done <= max(before, wait_for_more(client, batch_id, before))
        broken = outcome(client, batch_id)
        assert broken == outcome(client, begin(client))
        failed = {name for name, told in broken.items() if isinstance(told, dict)}
        assert failed == {f"r{index}" for index in range(3, NUM_LINES, 4)}


def test_a_restart_with_other_adapters_answers_what_is_left_with_those(
    tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str], tmp_path: Path
) -> None:
    options = ["--batch-dir", str(tmp_path / "batches"), "--batch-max-num-seqs", "1"]
    with serving(command(tiny_model[0], tiny_adapters, *options)) as (process, client):
        batch_id = begin(client)
        wait_for_more(client, batch_id, 0)
        process.kill()
    with serving(
        command(tiny_model[0], {"a0": tiny_adapters["a0"], "a1": tiny_adapters["a2"]}, *options)
    ) as (
        _,
        client,
    ):
        assert len(outcome(client, batch_id)) == NUM_LINES


@pytest.mark.parametrize("option", [["--batch-dir", "/proc/none"], ["--batch-dir-size", "none"]])
def test_a_directory_that_can_t_be_used_ends_the_start(
    option: list[str], tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]
) -> None:
    done = subprocess.run(
        command(tiny_model[0], tiny_adapters, *option), capture_output=True, text=True, check=False
    )
    assert done.returncode in (1, 2)
    assert option[0].lstrip("-").replace("-", "_").split("_")[0] in done.stderr
    assert "Traceback" not in done.stderr
