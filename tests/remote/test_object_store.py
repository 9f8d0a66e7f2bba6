"""Adapters of a bucket, as S3 has it; refusals say what to set, and no secret."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loraserve.adapters.remote import WANTED
from loraserve.errors import AdapterFormatError, SourceUnavailableError
from loraserve.remote.disk_cache import CacheEntry, DiskCache
from loraserve.remote.fetcher import Fetcher, NothingThereError
from loraserve.remote.location import AllowedLocations, parse_remote

from tests.remote.s3 import BUCKET, SECRET, Bucket

WEIGHTS = os.urandom(9_000_000)  # more than a piece
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        bucket = Bucket(patch)
        for name, data in {**FILES, "optimizer.pt": b"x", "checkpoint-1/adapter_config.json": b"x"}.items():
            bucket.put(f"adapters/sql/{name}", data)
        bucket.put("adapters/json/adapter_config.json", b"{}")
        yield bucket
        bucket.stop()


def fetcher(folder: Path, max_nbytes: int = 10**9) -> Fetcher:
    return Fetcher(DiskCache(folder / "cache", max_nbytes), WANTED, AllowedLocations())


def fetch(fetcher: Fetcher, path: str) -> CacheEntry:
    return fetcher.fetch(parse_remote(f"s3://{BUCKET}/{path}"))


def contents(entry: CacheEntry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.path.iterdir() if path.name[0] != "."}


def test_an_adapter_comes_once_and_with_progress(bucket: Bucket, tmp_path: Path) -> None:
    fetches, told = fetcher(tmp_path), []
    location = parse_remote(f"s3://{BUCKET}/adapters/sql")
    for _ in range(2):
        entry = fetches.fetch(location, lambda done, total: told.append((done, total)))
        assert contents(entry) == FILES
    assert (fetches.counts.downloads, fetches.counts.disk_hits) == (1, 1)
    total = sum(map(len, FILES.values()))
    assert told[-1] == (total, total)
    assert fetches.counts.downloaded_nbytes == total


def test_processes_share_the_disk(bucket: Bucket, tmp_path: Path) -> None:
    fetch(fetcher(tmp_path), "adapters/sql")
    second = fetcher(tmp_path)
    assert contents(fetch(second, "adapters/sql")) == FILES
    assert second.counts.downloads == 0


def test_a_new_version_is_another_entry_and_the_old_one_stays_while_it_is_used(
    bucket: Bucket, tmp_path: Path
) -> None:
    fetches = fetcher(tmp_path, 30_000_000)
    bucket.put_directory("adapters/changing", write(tmp_path / "v0", FILES))
    old = fetch(fetches, "adapters/changing")
    for version in range(6):
        data = os.urandom(9_000_000)
        bucket.put("adapters/changing/adapter_model.safetensors", data)
        entry = fetch(fetches, "adapters/changing")
        assert contents(entry)["adapter_model.safetensors"] == data
        entry.close()
        assert contents(old) == FILES, version
    lies = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert lies < 31_000_000


def test_names_are_listed(bucket: Bucket, tmp_path: Path) -> None:
    assert {"sql", "json"} <= set(fetcher(tmp_path).names(parse_remote(f"s3://{BUCKET}/adapters")))
    assert fetcher(tmp_path).names(parse_remote(f"s3://{BUCKET}/nothing")) == []


@pytest.mark.parametrize("path", ["adapters/none", "adapters", "none.tgz"])
def test_there_is_nothing(bucket: Bucket, tmp_path: Path, path: str) -> None:
    with pytest.raises(NothingThereError):
        fetch(fetcher(tmp_path), path)


def test_no_such_bucket(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(NothingThereError):
        fetcher(tmp_path).fetch(parse_remote("s3://no-such-bucket-here/a"))


def test_without_credentials_it_says_what_to_set(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("loraserve.remote.object_store.CONNECT_LIMIT_S", 1)
    with pytest.raises(SourceUnavailableError, match="AWS_ACCESS_KEY_ID"):
        fetch(fetcher(tmp_path), "adapters/sql")


def test_no_secret_is_told(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetches = fetcher(tmp_path)
    fetch(fetches, "adapters/json")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:9")
    monkeypatch.setattr("loraserve.remote.transfer.FIRST_PAUSE_S", 0.001)
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(SourceUnavailableError) as caught:
            fetch(fetches, "adapters/sql")
        assert contents(fetch(fetches, "adapters/json"))
    assert "what was fetched before is used" in caplog.text
    assert SECRET not in caplog.text + str(caught.value)


def test_larger_than_the_cache_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--adapter-cache-size"):
        fetch(fetcher(tmp_path, 1_000_000), "adapters/sql")
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_damaged_sum_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("adapters/summed/adapter_config.json", b"{}")
    bucket.put("adapters/summed/SHA256SUMS", b"0" * 64 + b"  adapter_config.json\n")
    with pytest.raises(AdapterFormatError, match="SHA256SUMS"):
        fetch(fetcher(tmp_path), "adapters/summed")


@pytest.mark.parametrize("key", ["adapters/odd//x", "adapters/odd/../../x", "adapters/odd/./x"])
def test_an_odd_key_beside_an_adapter_harms_neither_it_nor_others(
    bucket: Bucket, tmp_path: Path, key: str
) -> None:
    index = {"weight_map": {"a": "adapter_model-00001-of-00001.safetensors"}}
    shards = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors.index.json": json.dumps(index).encode(),
        "adapter_model-00001-of-00001.safetensors": b"weights",
    }
    for name, data in shards.items():
        bucket.put(f"adapters/odd/{name}", data)
    bucket.put(key, b"x")
    fetches = fetcher(tmp_path)
    for _ in range(8):
        assert contents(fetch(fetches, "adapters/odd")) == shards
    assert contents(fetch(fetches, "adapters/sql")) == FILES
    bucket.client.delete_object(Bucket=BUCKET, Key=key)


def test_what_is_damaged_on_disk_is_fetched_again(bucket: Bucket, tmp_path: Path) -> None:
    entry = fetch(fetcher(tmp_path), "adapters/sql")
    entry.close()
    with (entry.path / "adapter_model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"x" * 100)
    again = fetcher(tmp_path)
    assert contents(fetch(again, "adapters/sql")) == FILES
    assert again.counts.downloads == 1


def test_names_that_are_nowhere_leave_nothing_on_disk(bucket: Bucket, tmp_path: Path) -> None:
    fetches = fetcher(tmp_path)
    for index in range(20):
        with pytest.raises(NothingThereError):
            fetch(fetches, f"adapters/none-{index}")
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_processes_fetch_once(bucket: Bucket, tmp_path: Path) -> None:
    """Locks that are removed while others wait for them let one in at a time."""
    fetchers = [fetcher(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        entries = list(threads.map(lambda one: fetch(one, "adapters/sql"), fetchers))
    assert all(contents(entry) == FILES for entry in entries)
    assert sum(one.counts.downloads for one in fetchers) == 1


def test_a_process_that_is_stopped_while_it_fetches_is_waited_for_no_longer_than_it_takes(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraserve.remote.disk_cache.STALLED_S", 0.3)
    stopped, waits = fetcher(tmp_path), fetcher(tmp_path)
    location = parse_remote(f"s3://{BUCKET}/adapters/sql")
    with (
        stopped.cache.fetching(location),
        pytest.raises(SourceUnavailableError, match=r"got nothing for 0\.3 s") as caught,
    ):
        waits.fetch(location)
    assert caught.value.retry_after_s == 5.0
    assert contents(waits.fetch(location)) == FILES  # the source has not been given up


def write(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path
