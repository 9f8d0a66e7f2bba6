"""Artifacts of a registry of containers: layers, tokens, redirects, and what lies."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from loraserve.adapters.remote import WANTED
from loraserve.errors import AdapterFormatError, CapacityError, LoraserveError, SourceUnavailableError
from loraserve.remote.disk_cache import DiskCache
from loraserve.remote.fetcher import Fetcher, NothingThereError
from loraserve.remote.location import AllowedLocations, parse_remote
from loraserve.remote.registry import RegistryStore
from loraserve.remote.store import WrongAnswerError

CONFIG, WEIGHTS = b'{"r": 1}', bytes(range(256)) * 2000
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
TITLE = "org.opencontainers.image.title"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
PLAIN = "application/vnd.oci.image.layer.v1.tar"  # as ORAS calls any file
Rule = Callable[[BaseHTTPRequestHandler], None]


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Registry:
    """Serves `blobs` by digest and `manifests` by tag or digest; a rule for a path answers in their place."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.rules: dict[str, list[Rule]] = {}
        self.token: str | None = None  # which is asked for
        self.basic: str | None = None  # for which the realm gives it, or the registry answers
        self.asked: list[tuple[str, dict[str, str]]] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                registry.asked.append((self.path, headers))
                registry.answer(self, self.path.partition("?")[0], headers)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # clients that leave in the middle
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.host = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, path: str, headers: dict[str, str]) -> None:
        sent = headers.get("authorization", "")
        if rules := self.rules.get(path):
            rules.pop(0)(handler)
        elif path == "/token":
            if self.basic is not None and sent != f"Basic {self.basic}":
                send(handler, 401, b"")
            else:
                send(handler, 200, json.dumps({"token": self.token}).encode())
        elif self.token is None and self.basic is not None and sent != f"Basic {self.basic}":
            send(handler, 401, b"", {"www-authenticate": 'Basic realm="here"'})
        elif self.token is not None and sent != f"Bearer {self.token}":
            realm = f'Bearer realm="http://{self.host}/token",service="here",scope="everything"'
            send(handler, 401, b"", {"www-authenticate": realm})
        elif (name := path.removeprefix("/v2/team/sql/manifests/")) in self.manifests:
            data = self.manifests[name]
            send(handler, 200, data, {"docker-content-digest": digest(data)})
        elif (name := path.removeprefix("/v2/team/sql/blobs/")) in self.blobs:
            send_blob(handler, self.blobs[name])
        else:
            send(handler, 404, b"")

    def blob(self, data: bytes, media_type: str = PLAIN, **annotations: str) -> dict[str, Any]:
        self.blobs[digest(data)] = data
        told = {TITLE if name == "title" else name: value for name, value in annotations.items()}
        return {"mediaType": media_type, "digest": digest(data), "size": len(data), "annotations": told}

    def manifest(self, tag: str, layers: list[Any], **more: object) -> str:
        """Its digest."""
        told = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": layers, **more}
        data = json.dumps(told).encode()
        self.manifests |= {tag: data, digest(data): data}
        return digest(data)

    def push(self, tag: str = "latest", files: dict[str, bytes] = FILES) -> str:
        return self.manifest(tag, [self.blob(data, title=name) for name, data in files.items()])


def send(
    handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def send_blob(handler: BaseHTTPRequestHandler, data: bytes, cut: int | None = None) -> None:
    start = int(handler.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
    handler.send_response(206 if start else 200)
    handler.send_header("content-length", str(len(data) - start))
    if start:
        handler.send_header("content-range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    handler.end_headers()
    handler.wfile.write(data[start:] if cut is None else data[start : start + cut])
    handler.close_connection = cut is not None


def redirect(to: str) -> Rule:
    return lambda handler: send(handler, 307, b"", {"location": to})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setattr("loraserve.remote.transfer.FIRST_PAUSE_S", 0.001)
    registry = Registry()
    yield registry
    registry.close()


def fetcher(folder: Path, *allowed: str) -> Fetcher:
    return Fetcher(DiskCache(folder / "cache", 10**8), WANTED, AllowedLocations.parsed(allowed))


def fetched(fetcher: Fetcher, registry: Registry, reference: str = ":latest") -> dict[str, bytes]:
    entry = fetcher.fetch(parse_remote(f"oci://{registry.host}/team/sql{reference}"))
    entry.close()
    return {path.name: path.read_bytes() for path in entry.path.iterdir() if path.name[0] != "."}


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_files_of_a_tag_and_of_a_digest_come_once(registry: Registry, tmp_path: Path) -> None:
    pushed = registry.push(files={**FILES, "README.md": b"not wanted"})
    fetches = fetcher(tmp_path)
    for reference in ("", ":latest", ":latest", f"@{pushed}"):
        assert fetched(fetches, registry, reference) == FILES
    assert fetches.counts.downloads == 2  # a tag and a digest are two places
    assert digest(b"not wanted") not in str(registry.asked)


def test_a_tag_that_moves_is_a_new_version(registry: Registry, tmp_path: Path) -> None:
    registry.push()
    fetches = fetcher(tmp_path)
    assert fetched(fetches, registry) == FILES
    registry.push(files={**FILES, "adapter_model.safetensors": b"new"})
    assert fetched(fetches, registry)["adapter_model.safetensors"] == b"new"


@pytest.mark.parametrize(
    ("media_type", "annotations", "packed"),
    [
        (
            PLAIN,
            {TITLE: "sql", "io.deis.oras.content.unpack": "true"},
            tar({f"sql/{n}": d for n, d in FILES.items()}, "w:gz"),
        ),
        ("application/vnd.oci.image.layer.v1.tar+gzip", {TITLE: "sql"}, tar(FILES, "w:gz")),
        ("application/vnd.oci.image.layer.v1.tar+gzip", {}, gzip.compress(tar(FILES))),
        ("application/vnd.kitops.modelkit.model.v1.tar+gzip", {}, tar(FILES, "w:gz")),
        ("application/vnd.cncf.model.weight.v1.tar", {"org.cncf.model.filepath": "sql"}, tar(FILES)),
        (PLAIN, {TITLE: "sql.tar"}, tar(FILES)),
    ],
)
def test_layers_that_are_tars_are_unpacked(
    registry: Registry, tmp_path: Path, media_type: str, annotations: dict[str, str], packed: bytes
) -> None:
    layer = registry.blob(packed, media_type)
    other = registry.blob(tar({"code/train.py": b"x"}), "application/vnd.kitops.modelkit.code.v1.tar")
    registry.manifest("latest", [{**layer, "annotations": annotations}, other])
    assert fetched(fetcher(tmp_path), registry) == FILES


def test_an_index_of_one_manifest_is_followed_and_of_more_refused(registry: Registry, tmp_path: Path) -> None:
    pushed = registry.push("v1")
    other = registry.push("v2", {**FILES, "loraserve.json": b"{}"})
    one = {"mediaType": MANIFEST, "digest": pushed, "size": 1}
    attestation = {
        **one,
        "digest": other,
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    }
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [one, attestation]}
    registry.manifests["latest"] = json.dumps(index).encode()
    assert fetched(fetcher(tmp_path), registry) == FILES
    index["manifests"] = [one, {**one, "digest": other}]
    registry.manifests["both"] = json.dumps(index).encode()
    with pytest.raises(AdapterFormatError, match="index of 2 manifests, name one"):
        fetched(fetcher(tmp_path), registry, ":both")


def test_a_cut_blob_goes_on_where_it_ended(registry: Registry, tmp_path: Path) -> None:
    registry.push()
    path = f"/v2/team/sql/blobs/{digest(WEIGHTS)}"
    registry.rules[path] = [lambda handler: send_blob(handler, WEIGHTS, cut=1000)]
    assert fetched(fetcher(tmp_path), registry) == FILES
    asked = [headers.get("range") for url, headers in registry.asked if url == path]
    assert asked[0] is None
    assert asked[1] == "bytes=1000-"


@pytest.mark.parametrize("how", ["auth", "username", "prefix", "file"])
def test_credentials_of_dockers_config_get_a_token(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    registry.push()
    registry.token, registry.basic = "a-token", base64.b64encode(b"me:secret").decode()
    entry = {"username": "me", "password": "secret"} if how == "username" else {"auth": registry.basic}
    key = f"{registry.host}/team" if how == "prefix" else f"http://{registry.host}/v2/"
    config = tmp_path / "docker/config.json"
    if how == "file":
        config = tmp_path / "auth.json"
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(config))
    config.parent.mkdir(exist_ok=True)
    config.write_text(json.dumps({"auths": {key: entry, "elsewhere": {"auth": "bm8="}}}))
    assert fetched(fetcher(tmp_path), registry) == FILES
    (asked,) = [url for url, _ in registry.asked if url.startswith("/token")]
    assert "scope=repository%3Ateam%2Fsql%3Apull" in asked
    assert "service=here" in asked


def test_a_registry_that_wants_a_password_gets_it(registry: Registry, tmp_path: Path) -> None:
    registry.push()
    registry.basic = base64.b64encode(b"me:secret").decode()
    (tmp_path / "docker").mkdir()
    config = {"auths": {registry.host: {"auth": registry.basic}}}
    (tmp_path / "docker/config.json").write_text(json.dumps(config))
    assert fetched(fetcher(tmp_path), registry) == FILES
    (tmp_path / "docker/config.json").unlink()
    with pytest.raises(SourceUnavailableError, match="DOCKER_CONFIG"):
        fetched(fetcher(tmp_path / "other"), registry)


def test_a_public_repository_gets_a_token_for_nothing(registry: Registry, tmp_path: Path) -> None:
    registry.push()
    registry.token = "a-token"
    assert fetched(fetcher(tmp_path), registry) == FILES


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "DOCKER_CONFIG"),
        ('{"auths": {"HOST": {"auth": "bm86c2VjcmV0"}}}', "DOCKER_CONFIG"),
        ('{"auths": {"HOST": {}}, "credsStore": "desktop"}', "without a password"),
        ('{"auths": {"HOST": {"auth": "!"}}}', "not base64"),
        ('{"auths": []}', "no object"),
        ("{", "can't be read"),
    ],
)
def test_who_is_refused_is_told_where_credentials_come_from(
    registry: Registry, tmp_path: Path, config: str | None, why: str
) -> None:
    registry.push()
    registry.token, registry.basic = "a-token", "another"
    if config is not None:
        (tmp_path / "docker").mkdir()
        (tmp_path / "docker/config.json").write_text(config.replace("HOST", registry.host))
    with pytest.raises(SourceUnavailableError, match=why) as caught:
        fetched(fetcher(tmp_path), registry)
    assert "bm86" not in str(caught.value)


@pytest.mark.parametrize(
    ("realm", "why"),
    [
        ("http://token.example.com/", "without https"),
        ("https://token.example.com/", "allow it with --adapter-url https://token.example.com"),
        ("https://10.0.0.1/", "allow it with"),
        ("file:///etc/passwd", "without https"),
        ("", "names no realm"),
    ],
)
def test_no_credentials_go_to_a_realm_elsewhere(
    registry: Registry, tmp_path: Path, realm: str, why: str
) -> None:
    registry.push()
    challenge = {"www-authenticate": f'Bearer realm="{realm}"'}
    registry.rules["/v2/team/sql/manifests/latest"] = [lambda handler: send(handler, 401, b"", challenge)]
    with pytest.raises(AdapterFormatError, match=why):
        fetched(fetcher(tmp_path), registry)


@pytest.mark.parametrize("challenge", ["Bearer", 'Bearer service="here"'])
def test_a_challenge_without_a_realm_says_so(registry: Registry, tmp_path: Path, challenge: str) -> None:
    registry.push()
    registry.rules["/v2/team/sql/manifests/latest"] = [
        lambda handler: send(handler, 401, b"", {"www-authenticate": challenge})
    ]
    with pytest.raises(AdapterFormatError, match="names no realm"):
        fetched(fetcher(tmp_path), registry)


def test_a_blob_may_lie_elsewhere_which_is_told_no_token(registry: Registry, tmp_path: Path) -> None:
    elsewhere = Registry()
    elsewhere.rules["/storage"] = [lambda handler: send_blob(handler, WEIGHTS)]
    registry.push()
    registry.token = "a-token"
    path = f"/v2/team/sql/blobs/{digest(WEIGHTS)}"
    registry.rules[path] = [redirect(f"http://{elsewhere.host}/storage?signature=x")]
    assert fetched(fetcher(tmp_path), registry) == FILES
    ((_, headers),) = elsewhere.asked
    assert "authorization" not in headers
    elsewhere.close()


@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
def test_whoever_else_has_a_blob_can_ask_for_no_credentials(
    registry: Registry, tmp_path: Path, scheme: str
) -> None:
    elsewhere = Registry()
    registry.push()
    registry.basic = base64.b64encode(b"me:secret").decode()
    (tmp_path / "docker").mkdir()
    config = {"auths": {registry.host: {"auth": registry.basic}}}
    (tmp_path / "docker/config.json").write_text(json.dumps(config))
    challenge = {"www-authenticate": f'{scheme} realm="http://{elsewhere.host}/token"'}
    elsewhere.rules["/storage"] = [lambda handler: send(handler, 401, b"", challenge)] * 9
    path = f"/v2/team/sql/blobs/{digest(WEIGHTS)}"
    registry.rules[path] = [redirect(f"http://{elsewhere.host}/storage")]
    with pytest.raises(SourceUnavailableError, match="status 401"):
        fetched(fetcher(tmp_path), registry)
    assert [headers.get("authorization") for _, headers in elsewhere.asked] == [None]
    elsewhere.close()


def test_a_manifest_may_not(registry: Registry, tmp_path: Path) -> None:
    registry.rules["/v2/team/sql/manifests/latest"] = [redirect("http://127.0.0.1:1/x")]
    with pytest.raises(AdapterFormatError, match="status 307"):
        fetched(fetcher(tmp_path), registry)


@pytest.mark.parametrize("reference", [":none", f"@sha256:{'0' * 64}"])
def test_there_is_nothing(registry: Registry, tmp_path: Path, reference: str) -> None:
    with pytest.raises(NothingThereError):
        fetched(fetcher(tmp_path), registry, reference)


@pytest.mark.parametrize("path", ["Team/sql", "team/SQL", "team/_sql"])
def test_names_that_no_repository_has_are_not_asked_for(
    registry: Registry, tmp_path: Path, path: str
) -> None:
    with pytest.raises(NothingThereError):
        fetcher(tmp_path).fetch(parse_remote(f"oci://{registry.host}/{path}:v1"))
    assert registry.asked == []


def layer(**more: object) -> dict[str, object]:
    return {"mediaType": PLAIN, "digest": digest(CONFIG), "size": len(CONFIG), **more}


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        (b"[]", "no JSON object"),
        (b"{", "no JSON object"),
        (b"[" * 100_000, "no JSON object"),
        (b"{}", "no list of layers"),
        (b" " * (4 * 2**20 + 1), "has more than 4194304 bytes"),
        (json.dumps({"layers": [layer()] * 4097}).encode(), "more than 4096 layers"),
        (json.dumps({"layers": [layer(digest="sha512:00")]}).encode(), "without a digest of sha256"),
        (json.dumps({"layers": [layer(digest=digest(b"")[:-1] + "/")]}).encode(), "without a digest"),
        (json.dumps({"layers": [layer(size=-1)]}).encode(), "without a size"),
        (
            json.dumps({"layers": [layer(size=10**15, annotations={TITLE: "adapter_config.json"})]}).encode(),
            "the limit",
        ),
        (json.dumps({"layers": [7]}).encode(), "without a digest"),
        (
            json.dumps({"layers": [layer(annotations={TITLE: "../adapter_config.json"})]}).encode(),
            "leads elsewhere",
        ),
        (
            json.dumps({"layers": [layer(annotations={TITLE: "/adapter_config.json"})]}).encode(),
            "leads elsewhere",
        ),
        (json.dumps({"layers": [layer(annotations={TITLE: 7})]}).encode(), "no text"),
        (
            json.dumps({"layers": [layer(annotations={TITLE: "adapter_config.json"})] * 2}).encode(),
            "two layers of one",
        ),
        (
            json.dumps(
                {"layers": [layer(mediaType="application/vnd.cncf.model.weight.v1.tar+zstd")]}
            ).encode(),
            "zstd",
        ),
        (json.dumps({"mediaType": INDEX, "manifests": 7}).encode(), "index of 0 manifests"),
    ],
)
def test_manifests_that_are_none_are_refused(
    registry: Registry, tmp_path: Path, manifest: bytes, why: str
) -> None:
    registry.manifests["latest"] = manifest
    with pytest.raises(AdapterFormatError, match=why):
        fetched(fetcher(tmp_path), registry)


def test_digests_that_lie_are_found_out(registry: Registry, tmp_path: Path) -> None:
    pushed = registry.push()
    registry.blobs[digest(WEIGHTS)] = WEIGHTS[::-1]
    with pytest.raises(AdapterFormatError, match="not what was asked for"):
        fetched(fetcher(tmp_path), registry)
    assert not list((tmp_path / "cache").glob("*.part"))  # nothing of it is of use to another fetch
    registry.manifests[pushed] += b" "
    with pytest.raises(AdapterFormatError, match="its manifest has the digest"):
        fetched(fetcher(tmp_path), registry, f"@{pushed}")


def test_what_the_cache_cannot_take_is_not_fetched(registry: Registry, tmp_path: Path) -> None:
    registry.push()
    small = Fetcher(DiskCache(tmp_path / "cache", len(WEIGHTS)), WANTED, AllowedLocations())
    with pytest.raises(CapacityError, match="raise --adapter-cache-size"):
        fetched(small, registry)
    assert "/blobs/" not in str(registry.asked)


@pytest.mark.parametrize("at", [0, 1000])
def test_a_blob_that_is_longer_than_its_manifest_says_is_left(
    registry: Registry, tmp_path: Path, at: int
) -> None:
    registry.push()
    path, num_sent = f"/v2/team/sql/blobs/{digest(WEIGHTS)}", 0

    def send_without_end(handler: BaseHTTPRequestHandler) -> None:
        nonlocal num_sent
        handler.send_response(206 if at else 200)
        if at:
            handler.send_header("content-range", f"bytes {at}-{10**12 - 1}/{10**12}")
        handler.end_headers()
        handler.close_connection = True
        while num_sent < 200 * len(WEIGHTS):
            num_sent += handler.wfile.write(WEIGHTS)

    cut = [lambda handler: send_blob(handler, WEIGHTS, cut=at)] if at else []
    registry.rules[path] = [*cut, send_without_end]
    with pytest.raises(AdapterFormatError, match=f"more than the {len(WEIGHTS)} bytes of its manifest"):
        fetched(fetcher(tmp_path), registry)
    assert num_sent < 200 * len(WEIGHTS)


@pytest.mark.parametrize(
    "to", ["http://example.com/x", "https://10.0.0.1/x", "https://localhost/x", "ftp://h/x"]
)
def test_redirects_into_a_network_or_without_tls_are_refused(to: str) -> None:
    store = RegistryStore(parse_remote("oci://ghcr.io/a/b"), WANTED, AllowedLocations())
    request = httpx.Request("GET", "https://ghcr.io/v2/a/b/blobs/x")
    with pytest.raises(WrongAnswerError, match="it redirects to"):
        store._redirected(httpx.Response(307, headers={"location": to}, request=request))
    store.close()


def test_an_outage_leaves_what_is_on_disk(registry: Registry, tmp_path: Path) -> None:
    registry.push()
    fetches = fetcher(tmp_path)
    assert fetched(fetches, registry) == FILES
    registry.close()
    assert fetched(fetches, registry) == FILES
    with pytest.raises(LoraserveError, match="try again in"):
        fetched(fetches, registry, ":other")
