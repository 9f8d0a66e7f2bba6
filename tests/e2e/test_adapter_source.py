"""Adapters that requests name come from a bucket, each once; it may fail, and versions change."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve.adapters.remote import WANTED
from loraserve.client import Client
from loraserve.remote.disk_cache import DiskCache
from loraserve.remote.fetcher import Fetcher
from loraserve.remote.location import AllowedLocations, parse_remote

from tests.e2e.test_state_dir import GREEDY, serving
from tests.e2e.tiny import PROMPT
from tests.loader.test_resolve import FakeHub
from tests.remote.failing_source import Behaviour, FailingSource
from tests.remote.s3 import BUCKET, Bucket
from tests.remote.test_registry import Registry

TEMPLATE = f"s3://{BUCKET}/adapters/{{name}}"
WAIT_S = 60.0
AWAY_S = 5.0  # two looks at a watched directory
Model = tuple[Path, torch.nn.Module]


@pytest.fixture
def bucket(tiny_adapters: dict[str, str]) -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        bucket = Bucket(patch)
        for name, path in tiny_adapters.items():
            bucket.put_directory(f"adapters/{name}", path)
        yield bucket
        bucket.stop()


def options(folder: Path, *more: str) -> list[str]:
    return ["--adapter-source", TEMPLATE, "--adapter-cache-dir", str(folder / "cache"), *more]


def ask(http: httpx.Client, name: str, **headers: str) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
    return http.post("/v1/completions", json=body, headers=headers)


def tokens(grpc: Client, name: str) -> list[int]:
    return grpc.generate(PROMPT, GREEDY, adapter=name)[0].token_ids


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"loraserve_adapter_{name} "))


def until(is_so: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


def test_many_clients_find_every_adapter_and_each_comes_once(
    tiny_model: Model,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    bucket: Bucket,
    tmp_path: Path,
) -> None:
    names = list(tiny_adapters)
    with serving(tiny_model[0], *options(tmp_path)) as (http, grpc):
        until(lambda: len(http.get("/v1/models").json()["data"]) == len(names) + 1)
        rng = random.Random(0)
        asked = rng.choices(names, [1 / (rank + 1) ** 1.2 for rank in range(len(names))], k=200) + names
        with ThreadPoolExecutor(16) as clients:
            answers = list(clients.map(lambda name: tokens(grpc, name), asked))
        assert answers == [tiny_expected[name] for name in asked]
        assert metric(http, "downloads_total") == len(names)
        assert ask(http, "none").status_code == 404
        assert ask(http, "..").status_code == 404
    with serving(tiny_model[0], *options(tmp_path)) as (http, grpc):  # what lies on disk is not fetched again
        assert tokens(grpc, "a1") == tiny_expected["a1"]
        assert metric(http, "downloads_total") == 0


def test_an_outage_is_told_and_harms_nothing_that_is_here(
    tiny_model: Model, tiny_expected: dict[str, list[int]], bucket: Bucket, tmp_path: Path
) -> None:
    with serving(tiny_model[0], *options(tmp_path)) as (http, grpc):
        assert tokens(grpc, "a1") == tiny_expected["a1"]
    with serving(tiny_model[0], *options(tmp_path)) as (http, grpc):
        assert tokens(grpc, "a2") == tiny_expected["a2"]
        bucket.stop()
        for _ in range(7):
            answer = ask(http, "a3")
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["code"] == "adapter_source_unavailable"
            assert tokens(grpc, "a1") == tiny_expected["a1"]  # on disk
            assert tokens(grpc, "a2") == tiny_expected["a2"]  # in memory
        assert "left alone" in ask(http, "a3").text


@pytest.mark.parametrize("fails", ["refuses", "hangs", "503"])
def test_an_outage_under_load_ends_by_itself(
    tiny_model: Model,
    tiny_expected: dict[str, list[int]],
    bucket: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Behaviour,
) -> None:
    source = FailingSource(bucket.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", source.url)
    in_memory, on_disk, elsewhere = ["a1", "a2"], ["a3", "a4", "a5"], [f"a{index}" for index in range(10, 34)]
    another = Fetcher(DiskCache(tmp_path / "cache", 2**30), WANTED, AllowedLocations())  # a process of before
    for name in on_disk:
        another.fetch(parse_remote(TEMPLATE.replace("{name}", name))).close()
    with serving(tiny_model[0], *options(tmp_path)) as (http, grpc):
        for name in in_memory:
            tokens(grpc, name)
        source.behave(fails)
        with ThreadPoolExecutor(16) as clients:
            here = clients.map(lambda name: (name, tokens(grpc, name)), (in_memory + on_disk) * 4)
            away = clients.map(lambda name: ask(http, name, **{"x-adapter-wait": "2"}), elsewhere[:12])
            assert all(answer == tiny_expected[name] for name, answer in here)
            for answer in away:
                assert answer.status_code == 503, answer.text
                assert 1 <= int(answer.headers["retry-after"]) <= 8
        source.behave("answers")
        until(lambda: ask(http, elsewhere[-1]).status_code == 200)
        assert [tokens(grpc, name) for name in elsewhere] == [tiny_expected[name] for name in elsewhere]
    source.close()


def test_names_are_tags_of_a_registry(
    tiny_model: Model, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]], tmp_path: Path
) -> None:
    registry = Registry()
    for name in ("a1", "a2"):
        files = {path.name: path.read_bytes() for path in Path(tiny_adapters[name]).iterdir()}
        registry.push(name, files)
    more = [
        "--adapter-source",
        f"oci://{registry.host}/team/sql:{{name}}",
        "--adapter-cache-dir",
        str(tmp_path),
    ]
    with serving(tiny_model[0], *more) as (http, grpc):
        assert [tokens(grpc, name) for name in ("a1", "a2")] == [tiny_expected["a1"], tiny_expected["a2"]]
        assert ask(http, "none").status_code == 404
        sent = {"name": "x", "source": f"oci://{registry.host}/team/sql:a2"}
        assert http.post("/adapters", json=sent).status_code == 201
        elsewhere = {"name": "y", "source": f"oci://{registry.host}/team/json:a2"}
        assert http.post("/adapters", json=elsewhere).status_code == 403
    registry.close()


def test_what_is_being_written_over_is_told_to_come_back_for(
    tiny_model: Model,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    bucket: Bucket,
    tmp_path: Path,
) -> None:
    """a7 has another rank than a1: its config with a1's weights can't be served."""
    config = (Path(tiny_adapters["a7"]) / "adapter_config.json").read_bytes()
    bucket.put("adapters/a1/adapter_config.json", config)
    with serving(tiny_model[0], *options(tmp_path)) as (http, grpc):
        answer = ask(http, "a1")
        assert (answer.status_code, answer.headers.get("retry-after")) == (503, "2"), answer.text
        assert "being written" in answer.text
        bucket.put_directory("adapters/a1", tiny_adapters["a7"])
        assert tokens(grpc, "a1") == tiny_expected["a7"]


@pytest.mark.parametrize("how", ["source", "watched"])
def test_files_that_change_under_an_adapter_are_read_again(
    tiny_model: Model,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    tmp_path: Path,
    how: str,
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("a1", "a2", "a3"):
        shutil.copytree(tiny_adapters[name], folder / name)
    told = ["--adapter-source", f"{folder}/{{name}}"] if how == "source" else ["--adapter-dir", str(folder)]
    with serving(tiny_model[0], *told) as (http, grpc):
        body = {"model": "a1", "messages": [{"role": "user", "content": "x"}]}
        counted = http.post("/v1/messages/count_tokens", json=body)  # registers it, and loads nothing
        assert counted.status_code == 200, counted.text
        write(folder / "a1", tiny_adapters["a7"])
        answer = ask(http, "a1")
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
        until(lambda: ask(http, "a1").status_code == 200)
        assert tokens(grpc, "a1") == tiny_expected["a7"]


def test_a_new_version_takes_the_place_of_the_old_one(
    tiny_model: Model,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    bucket: Bucket,
    tmp_path: Path,
) -> None:
    more = ("--adapter-source-refresh-seconds", "0.2")
    with serving(tiny_model[0], *options(tmp_path, *more)) as (_http, grpc):
        assert tokens(grpc, "a1") == tiny_expected["a1"]
        bucket.put_directory("adapters/a1", tiny_adapters["a7"])
        found: list[list[int]] = []

        def is_new() -> bool:
            found.append(tokens(grpc, "a1"))
            return found[-1] == tiny_expected["a7"]

        until(is_new)
        assert all(one in (tiny_expected["a1"], tiny_expected["a7"]) for one in found)


def test_a_small_disk_lets_the_oldest_go(
    tiny_model: Model,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    bucket: Bucket,
    tmp_path: Path,
) -> None:
    sizes = [sum(file.stat().st_size for file in Path(path).iterdir()) for path in tiny_adapters.values()]
    limit = str(int(sum(sizes) / 3))
    with serving(tiny_model[0], *options(tmp_path, "--adapter-cache-size", limit)) as (http, grpc):
        for name in [*tiny_adapters, *tiny_adapters]:
            assert tokens(grpc, name) == tiny_expected[name]
            lies = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
            assert sum(path.stat().st_size for path in lies) <= int(limit) + 4096 * len(lies)
        assert len(http.get("/adapters").json()["adapters"]) < len(tiny_adapters)


def test_who_does_not_wait_is_told_when_to_come_back(
    tiny_model: Model, tiny_expected: dict[str, list[int]], bucket: Bucket, tmp_path: Path
) -> None:
    with serving(tiny_model[0], *options(tmp_path)) as (http, _grpc):
        answer = ask(http, "a5", **{"x-adapter-wait": "0"})
        assert (answer.status_code, "being fetched" in answer.text) == (503, True)
        assert int(answer.headers["retry-after"]) >= 1
        until(lambda: ask(http, "a5", **{"x-adapter-wait": "0"}).status_code == 200)


def test_keys_hold_for_what_can_be_fetched(tiny_model: Model, bucket: Bucket, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("- {name: one, secret: of-one, adapters: [a1]}\n- {name: all, secret: of-all}\n")
    with serving(tiny_model[0], *options(tmp_path, "--keys-file", str(keys))) as (http, _grpc):
        as_one = {"authorization": "Bearer of-one"}
        assert ask(http, "a2", **as_one).status_code == 403
        assert ask(http, "a1", **as_one).status_code == 200
        as_all = {"authorization": "Bearer of-all"}
        until(lambda: len(http.get("/v1/models", headers=as_all).json()["data"]) > 30)
        listed = http.get("/v1/models", headers=as_one).json()["data"]
        assert [model["id"] for model in listed[1:]] == ["a1"]


@pytest.mark.parametrize(
    "source",
    ["s3://elsewhere/adapters/a1", "https://127.0.0.1/a1", f"s3://{BUCKET}/adapters-2/a1", "gs://b/a"],
)
def test_what_is_not_allowed_is_not_asked_for(
    tiny_model: Model, bucket: Bucket, tmp_path: Path, source: str
) -> None:
    with serving(tiny_model[0], *options(tmp_path)) as (http, _grpc):
        answer = http.post("/adapters", json={"name": "x", "source": source})
        assert (answer.status_code, "--adapter-url" in answer.text) == (403, True)


def test_configured_sent_and_kept_ones_come_from_urls_too(
    tiny_model: Model, tiny_expected: dict[str, list[int]], bucket: Bucket, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/adapters"
    more = [
        "--adapter",
        f"fixed={url}/a1",
        "--adapter-url",
        url,
        "--adapter-cache-dir",
        str(tmp_path / "cache"),
    ]
    more += ["--state-dir", str(tmp_path / "state")]
    with serving(tiny_model[0], *more) as (http, grpc):
        assert tokens(grpc, "fixed") == tiny_expected["a1"]
        assert http.post("/adapters", json={"name": "sent", "source": f"{url}/a2"}).status_code == 201
        grpc.load_adapter("wired", f"{url}/a3")
        assert tokens(grpc, "sent") == tiny_expected["a2"]
        assert tokens(grpc, "wired") == tiny_expected["a3"]
        assert ask(http, "a4").status_code == 404  # no --adapter-source
    with serving(tiny_model[0], *more) as (http, grpc):
        assert tokens(grpc, "sent") == tiny_expected["a2"]
        assert tokens(grpc, "wired") == tiny_expected["a3"]


def test_a_template_may_be_a_directory(
    tiny_model: Model, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]], tmp_path: Path
) -> None:
    shutil.copytree(tiny_adapters["a1"], tmp_path / "adapters/a1")
    (tmp_path / "adapters/file").write_text("no adapter")
    with serving(tiny_model[0], "--adapter-source", f"{tmp_path}/adapters/{{name}}") as (http, grpc):
        assert tokens(grpc, "a1") == tiny_expected["a1"]
        assert [ask(http, name).status_code for name in ("a2", "..", "file")] == [404, 404, 400]
        shutil.copytree(tiny_adapters["a3"], tmp_path / "adapters/a3")
        assert tokens(grpc, "a3") == tiny_expected["a3"]


def test_a_template_may_be_of_the_hub(
    tiny_model: Model,
    tiny_adapters: dict[str, str],
    tiny_expected: dict[str, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeHub(Path(tiny_adapters["a1"])) as hub:
        serve = threading.Thread(target=hub.serve_forever)
        serve.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        with serving(tiny_model[0], "--adapter-source", "hf://owner/{name}") as (http, grpc):
            assert tokens(grpc, "tiny") == tiny_expected["a1"]
            assert ask(http, "none").status_code == 404
            hub.shutdown()
            serve.join()
            hub.server_close()
            answer = ask(http, "other")
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
            assert tokens(grpc, "tiny") == tiny_expected["a1"]


def write(folder: Path, source: str) -> None:
    """As a program writes it that does not know better: file by file, in place."""
    folder.mkdir(exist_ok=True)
    for path in sorted(Path(source).iterdir(), reverse=True):
        shutil.copyfile(path, folder / path.name)


def names(http: httpx.Client) -> Sequence[Any]:
    return [adapter["name"] for adapter in http.get("/adapters").json()["adapters"]]


def test_a_watched_directory_is_served_as_it_is(
    tiny_model: Model, tiny_adapters: dict[str, str], tiny_expected: dict[str, list[int]], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    write(folder.parent / "whole", tiny_adapters["a2"])
    folder.mkdir()
    write(folder / "first", tiny_adapters["a1"])
    (folder / "broken").mkdir()
    (folder / "broken/adapter_config.json").write_text("{")
    (folder / ".hidden").mkdir()
    with serving(tiny_model[0], "--adapter-dir", str(folder)) as (http, grpc):
        assert names(http) == ["first"]
        assert tokens(grpc, "first") == tiny_expected["a1"]
        (folder.parent / "whole").rename(folder / "second")
        until(lambda: names(http) == ["first", "second"])
        assert tokens(grpc, "second") == tiny_expected["a2"]
        write(folder / "first", tiny_adapters["a3"])
        until(lambda: tokens(grpc, "first") == tiny_expected["a3"])
        shutil.rmtree(folder / "second")
        until(lambda: names(http) == ["first"])
        write(folder / "broken", tiny_adapters["a4"])
        until(lambda: names(http) == ["broken", "first"])
        (folder / "loop").symlink_to("loop")
        (folder / "dangling").symlink_to("nowhere")
        write(folder / "beside", tiny_adapters["a5"])
        until(lambda: names(http) == ["beside", "broken", "first"])
        folder.rename(folder.parent / "away")  # as a mount that goes
        time.sleep(AWAY_S)
        folder.mkdir()  # and leaves its place
        time.sleep(AWAY_S)
        assert names(http) == ["beside", "broken", "first"]
        folder.rmdir()
        (folder.parent / "away").rename(folder)
        shutil.rmtree(folder / "first")
        until(lambda: names(http) == ["beside", "broken"])
