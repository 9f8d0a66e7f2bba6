"""Adapters on a (local, fake) Hub: only safetensors are fetched, with their progress."""

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from loraserve.adapters.beside import BESIDE_FILES, VOCABULARY_FILES

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
