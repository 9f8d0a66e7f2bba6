"""Adapters on a (local, fake) Hub: only safetensors are fetched, with their progress."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import loraserve.loader.hub as hub_module
import pytest
from loraserve.adapters.beside import BESIDE_FILES, VOCABULARY_FILES
from loraserve.adapters.hub import download_adapter
from loraserve.errors import AdapterFormatError

from tests.loader.test_resolve import FakeHub, run_with_hub

DOWNLOAD = """
import json
from loraserve.errors import AdapterFormatError
from loraserve.adapters.hub import download_adapter
seen = []
try:
    path = download_adapter({id!r}, {revision!r}, "hf_token", lambda done, total: seen.append((done, total)))
    print(json.dumps([sorted(file.name for file in path.iterdir()), seen[-1:]]))
except AdapterFormatError as error:
    print(error)
"""

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"x" * 5000,
    "adapter_model.bin": b"a pickle nobody wants",
    "loraserve.json": b"{}",
    "README.md": b"text",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    origin = tmp_path / "origin"
    origin.mkdir()
    for name, content in FILES.items():
        (origin / name).write_bytes(content)
    with FakeHub(origin) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download(hub: FakeHub, home: Path, id_: str = "owner/tiny", revision: str | None = None) -> str:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    return run_with_hub(endpoint, home, DOWNLOAD.format(id=id_, revision=revision))


def test_only_the_adapters_files_are_fetched_and_their_bytes_counted(hub: FakeHub, tmp_path: Path) -> None:
    wanted = ["adapter_config.json", "adapter_model.safetensors", "loraserve.json"]
    files, seen = json.loads(download(hub, tmp_path / "cache"))
    assert files == wanted
    assert hub.fetched == set(wanted)
    assert seen[0][0] == 5004


def test_what_is_compared_with_the_model_is_fetched_too(hub: FakeHub, tmp_path: Path) -> None:
    beside = [*BESIDE_FILES, *VOCABULARY_FILES]
    hub.files |= {name: b"{}" for name in beside}
    files, _ = json.loads(download(hub, tmp_path / "cache"))
    assert set(beside) <= set(files)


def test_a_repository_of_pickles_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    del hub.files["adapter_model.safetensors"]
    said = download(hub, tmp_path / "cache")
    assert said == "Hub repository 'owner/tiny' has no adapter_model.safetensors, adapters need it"
    assert "adapter_model.bin" not in hub.fetched


@pytest.mark.parametrize(
    ("id_", "text"),
    [
        ("owner/absent", "adapter 'owner/absent' is neither a local path nor on the Hub"),
        ("no spaces allowed", "adapter 'no spaces allowed' is neither a path nor a Hub id"),
        ("../etc", "adapter '../etc' is neither a path nor a Hub id"),
    ],
)
def test_what_is_not_there_is_one_clear_error(hub: FakeHub, tmp_path: Path, id_: str, text: str) -> None:
    assert download(hub, tmp_path / "cache", id_).startswith(text)


def test_a_hub_that_stops_to_answer_ends_in_an_error_and_progress_keeps_it_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    release, moves = threading.Event(), 6

    def download(repo_id: str, tqdm_class: Any, **_: Any) -> str:
        bar = tqdm_class(total=10, unit="B")
        for _ in range(moves if repo_id == "slow/one" else 0):
            time.sleep(0.1)  # together longer than a stall
            bar.update(1)
        if repo_id == "silent/one":
            release.wait(60.0)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub_module, "STALL_S", 0.4)
    monkeypatch.setattr(hub_module, "STALL_POLL_S", 0.02)
    seen: list[int] = []
    assert hub_module.snapshot("slow/one", on_progress=lambda done, _: seen.append(done)) == tmp_path
    assert seen == list(range(1, moves + 1))
    try:
        with pytest.raises(AdapterFormatError, match=r"adapter 'silent/one' .*nothing has come for 0\.4 s"):
            download_adapter("silent/one", on_progress=lambda *_: None)
    finally:
        release.set()
