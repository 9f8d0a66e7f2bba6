"""Adapters of web servers: redirects, ranges, refusals, cut answers, credentials."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from loraserve.adapters.remote import WANTED
from loraserve.errors import AdapterFormatError, SourceUnavailableError
from loraserve.remote.disk_cache import DiskCache
from loraserve.remote.fetcher import Fetcher, NothingThereError
from loraserve.remote.location import AllowedLocations, parse_remote

CONFIG, WEIGHTS = b'{"r": 1}', bytes(range(256)) * 2000
Rule = Callable[[BaseHTTPRequestHandler], None]


class Site:
    """Serves `files` by path; a rule for a path answers in their place."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.rules: dict[str, list[Rule]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                site.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                if rules := site.rules.get(path):
                    rules.pop(0)(self)
                elif path in site.files:
                    site.send(self, site.files[path])
                else:
                    self.send_error(404)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that leave in the middle
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def send(self, handler: BaseHTTPRequestHandler, data: bytes, cut: int | None = None) -> None:
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        start = 0
        if (asked := handler.headers.get("range")) and handler.headers.get("if-range", etag) == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        handler.send_header("etag", etag)
        handler.send_header("content-length", str(len(data) - start))
        if start:
            handler.send_header("content-range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        try:
            handler.wfile.write(data[start:] if cut is None else data[start : start + cut])
        except OSError:  # it only wanted the head
            handler.close_connection = True
        if cut is not None:
            handler.close_connection = True

    def add(self, prefix: str) -> None:
        self.files[f"{prefix}/adapter_config.json"] = CONFIG
        self.files[f"{prefix}/adapter_model.safetensors"] = WEIGHTS

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


@pytest.fixture
def other_site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def fetcher(folder: Path, *allowed: str) -> Fetcher:
    return Fetcher(DiskCache(folder / "cache", 10**8), WANTED, AllowedLocations.parsed(allowed))


def fetched(fetcher: Fetcher, url: str) -> dict[str, bytes]:
    entry = fetcher.fetch(parse_remote(url))
    entry.close()
    return {path.name: path.read_bytes() for path in entry.path.iterdir() if path.name[0] != "."}


def status(code: int, **headers: str) -> Rule:
    def rule(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return rule


def test_a_directory_comes_and_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    site.add("/sql")
    site.files["/sql/README.md"] = b"not wanted"
    fetch = fetcher(tmp_path)
    for _ in range(2):
        assert fetched(fetch, f"{site.url}/sql") == {
            "adapter_config.json": CONFIG,
            "adapter_model.safetensors": WEIGHTS,
        }
    assert (fetch.counts.downloads, fetch.counts.disk_hits) == (1, 1)
    assert not any("README" in path for path, _ in site.asked)


def test_shards_come_by_their_index(site: Site, tmp_path: Path) -> None:
    index = "adapter_model.safetensors.index.json"
    shard = "adapter_model-00001-of-00001.safetensors"
    site.files |= {
        "/sql/adapter_config.json": CONFIG,
        f"/sql/{index}": json.dumps({"weight_map": {"a": shard, "b": shard}}).encode(),
        f"/sql/{shard}": WEIGHTS,
    }
    assert set(fetched(fetcher(tmp_path), f"{site.url}/sql")) == {"adapter_config.json", index, shard}


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "adapter_model.bin", "a/adapter_config.json", 7]
)
def test_an_index_leads_nowhere_else(site: Site, tmp_path: Path, name: object) -> None:
    site.add("/sql")
    site.files["/sql/adapter_model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    with pytest.raises(AdapterFormatError, match="names files that no adapter has|no weight_map"):
        fetched(fetcher(tmp_path), f"{site.url}/sql")
    assert not any("secret" in path or "passwd" in path for path, _ in site.asked)


def test_there_is_nothing(site: Site, tmp_path: Path) -> None:
    with pytest.raises(NothingThereError, match="no adapter at http://127.0.0.1"):
        fetched(fetcher(tmp_path), f"{site.url}/none")


def test_a_cut_answer_is_gone_on_with(site: Site, tmp_path: Path) -> None:
    site.add("/sql")
    path = "/sql/adapter_model.safetensors"
    cut: Rule = lambda handler: site.send(handler, WEIGHTS, cut=100_000)  # noqa: E731
    site.rules[path] = [lambda handler: site.send(handler, WEIGHTS), cut, cut, status(503)]
    assert fetched(fetcher(tmp_path), f"{site.url}/sql")["adapter_model.safetensors"] == WEIGHTS
    ranges = [headers["range"] for asked, headers in site.asked if asked == path and "range" in headers]
    assert ranges[0].startswith("bytes=1")


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_redirects_stay_where_they_may_be(site: Site, other_site: Site, tmp_path: Path, code: int) -> None:
    other_site.files["/a.tgz"] = archive()
    site.rules["/a.tgz"] = [status(code, location=f"{other_site.url}/a.tgz?sig=SECRET")] * 9
    with pytest.raises(
        AdapterFormatError, match="redirects to http://127.0.0.1:[0-9]+, which is not allowed"
    ) as caught:
        fetched(fetcher(tmp_path), f"{site.url}/a.tgz")
    assert "SECRET" not in str(caught.value)
    assert not other_site.asked
    assert len(fetched(fetcher(tmp_path, other_site.url), f"{site.url}/a.tgz")) == 2


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "//user:pw@127.0.0.1/x",
        "gopher://x/y",
    ],
)
def test_redirects_to_elsewhere_are_refused(site: Site, tmp_path: Path, target: str) -> None:
    site.rules["/a.tgz"] = [status(302, location=target)]
    with pytest.raises(AdapterFormatError, match="redirects to"):
        fetched(fetcher(tmp_path), f"{site.url}/a.tgz")


def test_redirects_end(site: Site, tmp_path: Path) -> None:
    site.rules["/a.tgz"] = [status(302, location="/a.tgz")] * 100
    with pytest.raises(AdapterFormatError, match="redirects more than 5 times"):
        fetched(fetcher(tmp_path), f"{site.url}/a.tgz")


def test_credentials_come_from_netrc_for_their_host_alone(
    site: Site, other_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password not-to-be-shown\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    site.rules["/a.tgz"] = [status(403)]
    with pytest.raises(SourceUnavailableError, match="status 403") as caught:
        fetched(fetcher(tmp_path), f"{site.url}/a.tgz")
    assert site.asked[0][1]["authorization"].startswith("Basic ")
    assert "not-to-be-shown" not in str(caught.value)
    elsewhere = other_site.url.replace("127.0.0.1", "localhost")
    site.rules["/b.tgz"] = [status(302, location=f"{elsewhere}/b.tgz")]
    with pytest.raises(NothingThereError):
        fetched(fetcher(tmp_path, elsewhere), f"{site.url}/b.tgz")
    assert "authorization" not in other_site.asked[0][1]


def test_compressed_answers_are_refused(site: Site, tmp_path: Path) -> None:
    site.rules["/a.tgz"] = [status(200, content_encoding="gzip")]
    with pytest.raises(AdapterFormatError, match="compresses"):
        fetched(fetcher(tmp_path), f"{site.url}/a.tgz")


def archive() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in (("adapter_config.json", CONFIG), ("adapter_model.safetensors", WEIGHTS)):
            member = tarfile.TarInfo(f"sql/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


@pytest.mark.parametrize("is_right", [True, False])
def test_an_archive_has_the_sum_that_was_asked_for(site: Site, tmp_path: Path, is_right: bool) -> None:
    data = site.files["/a.tgz"] = archive()
    digest = hashlib.sha256(data).hexdigest() if is_right else "0" * 64
    fetch, url = fetcher(tmp_path), f"{site.url}/a.tgz?token=SECRET#sha256={digest}"
    if is_right:
        assert fetched(fetch, url)["adapter_model.safetensors"] == WEIGHTS
        assert site.asked[0][0] == "/a.tgz?token=SECRET"
    else:
        with pytest.raises(AdapterFormatError, match="SHA-256") as caught:
            fetched(fetch, url)
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("code", [500, 502, 503, 429])
def test_a_source_that_fails_is_left_alone_and_comes_back(
    site: Site, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraserve.remote.transfer.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("loraserve.remote.breaker.FIRST_PAUSE_S", 0.3)
    site.add("/sql")
    site.add("/new")
    fetch = fetcher(tmp_path)
    assert len(fetched(fetch, f"{site.url}/sql")) == 2
    site.rules["/sql/SHA256SUMS"] = site.rules["/new/SHA256SUMS"] = [status(code)] * 10_000
    for _ in range(8):
        with pytest.raises(SourceUnavailableError, match="try again in") as caught:
            fetched(fetch, f"{site.url}/new")
        assert caught.value.retry_after_s > 0
        assert len(fetched(fetch, f"{site.url}/sql")) == 2  # as it lies on disk
    num_asked = len(site.asked)
    with pytest.raises(SourceUnavailableError, match="left alone"):
        fetched(fetch, f"{site.url}/new")
    assert len(site.asked) == num_asked
    site.rules.clear()
    for _ in range(100):
        try:
            assert len(fetched(fetch, f"{site.url}/new")) == 2
            break
        except SourceUnavailableError:
            threading.Event().wait(0.05)
    else:
        pytest.fail("it was not asked again")
