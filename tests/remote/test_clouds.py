"""Adapters of Google's and Azure's buckets, from fakes of both on this machine."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraserve.adapters.remote import WANTED
from loraserve.errors import InvalidRequestError, SourceUnavailableError
from loraserve.remote.disk_cache import CacheEntry, DiskCache
from loraserve.remote.fetcher import Fetcher, NothingThereError
from loraserve.remote.location import AllowedLocations, parse_remote
from loraserve.remote.object_store import PIECE_NBYTES

from tests.remote.fake_clouds import BUCKET, FakeCloud

WEIGHTS = os.urandom(PIECE_NBYTES + 1000)
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
KEY = base64.b64encode(b"a key of azure, not to be shown").decode()
TOKEN = "a-token-of-google-not-to-be-shown"
VARIABLES = ("AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN")


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloud]:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    cloud = FakeCloud(request.param, f"Bearer {TOKEN}" if request.param == "gs" else "SharedKey account:")
    cloud.files = {f"adapters/sql/{name}": data for name, data in FILES.items()}
    cloud.files["adapters/json/adapter_config.json"] = b"{}"
    if request.param == "gs":
        monkeypatch.setenv("GOOGLE_BASE_URL", cloud.url)
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", TOKEN)
    else:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", cloud.url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setattr("loraserve.remote.transfer.FIRST_PAUSE_S", 0.001)
    yield cloud
    cloud.close()


def fetcher(folder: Path) -> Fetcher:
    return Fetcher(DiskCache(folder / "cache", 10**9), WANTED, AllowedLocations())


def fetch(fetcher: Fetcher, cloud: FakeCloud, path: str, bucket: str = BUCKET) -> CacheEntry:
    return fetcher.fetch(parse_remote(f"{cloud.kind}://{bucket}/{path}"))


def contents(entry: CacheEntry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.path.iterdir() if path.name[0] != "."}


def test_an_adapter_comes_once_in_pieces(cloud: FakeCloud, tmp_path: Path) -> None:
    fetches = fetcher(tmp_path)
    for _ in range(2):
        assert contents(fetch(fetches, cloud, "adapters/sql")) == FILES
    assert (fetches.counts.downloads, fetches.counts.disk_hits) == (1, 1)
    assert f"bytes={PIECE_NBYTES}-{len(WEIGHTS) - 1}" in cloud.ranges
    assert fetches.changed_at(parse_remote(f"{cloud.kind}://{BUCKET}/adapters/sql")) is not None


def test_names_are_listed(cloud: FakeCloud, tmp_path: Path) -> None:
    location = parse_remote(f"{cloud.kind}://{BUCKET}/adapters")
    assert sorted(fetcher(tmp_path).names(location)) == ["json", "sql"]


def test_a_fetch_that_failed_goes_on(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.refusals = [503, 500, 429, 0, 0, 0, 503]  # the last of them is of the second piece
    fetches = fetcher(tmp_path)
    assert contents(fetch(fetches, cloud, "adapters/sql")) == FILES
    assert cloud.refusals == []
    assert fetches.counts.downloaded_nbytes == sum(map(len, FILES.values()))
    assert cloud.ranges.count(f"bytes=0-{PIECE_NBYTES - 1}") == 1


def test_a_new_version_takes_the_place_of_the_old_one(cloud: FakeCloud, tmp_path: Path) -> None:
    fetches = fetcher(tmp_path)
    fetch(fetches, cloud, "adapters/sql").close()
    cloud.files["adapters/sql/adapter_model.safetensors"] = b"new"
    location = parse_remote(f"{cloud.kind}://{BUCKET}/adapters/sql")
    assert fetches.check(location) is None
    assert contents(fetches.fetch(location))["adapter_model.safetensors"] == b"new"


@pytest.mark.parametrize("path", ["adapters/none", "adapters", "none.tgz"])
def test_there_is_nothing(cloud: FakeCloud, tmp_path: Path, path: str) -> None:
    with pytest.raises(NothingThereError):
        fetch(fetcher(tmp_path), cloud, path)


def test_no_such_bucket(cloud: FakeCloud, tmp_path: Path) -> None:
    with pytest.raises(NothingThereError):
        fetch(fetcher(tmp_path), cloud, "adapters/sql", "no-such-bucket-here")


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_refused_is_told_what_to_set_and_no_secret(
    cloud: FakeCloud, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    cloud.refusals = [status] * 3
    name = "GOOGLE_SERVICE_ACCOUNT" if cloud.kind == "gs" else "AZURE_STORAGE_ACCOUNT_KEY"
    with caplog.at_level(logging.DEBUG), pytest.raises(SourceUnavailableError, match=name) as caught:
        fetch(fetcher(tmp_path), cloud, "adapters/sql")
    said = caplog.text + str(caught.value)
    assert TOKEN not in said
    assert KEY not in said


def test_wrong_credentials_are_refused(
    cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "another")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "another")
    with pytest.raises(SourceUnavailableError, match="refuses the credentials"):
        fetch(fetcher(tmp_path), cloud, "adapters/sql")


def test_without_credentials_it_says_what_to_set(
    cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("loraserve.remote.object_store.CONNECT_LIMIT_S", 1.0)
    monkeypatch.setattr("loraserve.remote.fetcher.LIST_LIMIT_S", 1.0)
    with pytest.raises(SourceUnavailableError, match=r"GOOGLE_SERVICE_ACCOUNT|AZURE_STORAGE_ACCOUNT_KEY"):
        fetch(fetcher(tmp_path), cloud, "adapters/sql")


def test_a_public_bucket_needs_none(
    cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    cloud.authorization = None
    assert contents(fetch(fetcher(tmp_path), cloud, "adapters/sql")) == FILES


def test_the_emulator_of_googles_clients_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = FakeCloud("gs", None)
    cloud.files["a/adapter_config.json"] = b"{}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", cloud.url.removeprefix("http://"))
    assert contents(fetch(fetcher(tmp_path), cloud, "a")) == {"adapter_config.json": b"{}"}
    cloud.close()


@pytest.mark.parametrize(
    ("scheme", "variables"),
    [
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "", "AZURE_STORAGE_ACCOUNT_KEY": "not base 64!"}),
        ("gs", {"GOOGLE_SERVICE_ACCOUNT": "/no/such/file.json"}),
    ],
)
def test_an_environment_that_makes_no_sense_is_told_without_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidRequestError, match="can't be used with this environment") as caught:
        fetcher(tmp_path).fetch(parse_remote(f"{scheme}://bucket/a"))
    assert not any(value in str(caught.value) for value in variables.values() if value)
