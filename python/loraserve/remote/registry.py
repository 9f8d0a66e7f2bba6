"""`RegistryStore`: an artifact of a registry of containers, as ORAS, KitOps and ModelPack push them.

Of the distribution protocol (github.com/opencontainers/distribution-spec): manifests by tag or digest, blobs
by digest. Of oras on PyPI (0.2) nothing is used: it follows a realm anywhere, has no limit of time or size,
and begins anew what was cut.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, Final

import httpx

from loraserve.remote.http_answers import REDIRECTS, body, check_status, ranged_body, typed_errors
from loraserve.remote.location import ARCHIVE_ENDS, AllowedLocations, RemoteLocation
from loraserve.remote.registry_access import (
    CREDENTIALS,
    DOCKER_HUB,
    RegistryAccess,
    is_inside,
    is_loopback,
)
from loraserve.remote.store import (
    CONNECT_LIMIT_S,
    LIST_LIMIT_S,
    READ_LIMIT_S,
    NotThereError,
    RemoteFile,
    WantedFiles,
    WrongAnswerError,
)
from loraserve.validation.printable import printable

MAX_MANIFEST_NBYTES: Final = 4 * 2**20  # as the specification has it
MAX_LAYERS: Final = 4096
MAX_REDIRECTS: Final = 5
INDEX_TYPES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_TITLE: Final = "org.opencontainers.image.title"
NAME_ANNOTATIONS: Final = (_TITLE, "org.cncf.model.filepath")
UNPACK_ANNOTATION: Final = "io.deis.oras.content.unpack"
_TAR = re.compile(r"[.+/]tar(?:[.+]gzip)?$")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class RegistryStore:
    """The files of an artifact: layers that have names, and what lies in layers that are tars.

    A registry on this machine is asked by HTTP, others by HTTPS. A blob may come from elsewhere, which is
    told no credentials, since its digest says what it must be.

    Args:
        location: of which registry, repository, tag or digest.
        wanted: which names count.
        allowed: where tokens may come from, besides the registry's own domain.
        list_limit_s: before an answer that tells what there is.
    """

    def __init__(
        self,
        location: RemoteLocation,
        wanted: WantedFiles,
        allowed: AllowedLocations,
        list_limit_s: float = LIST_LIMIT_S,
    ) -> None:
        self._location = location
        self._wanted = wanted
        host = "registry-1.docker.io" if location.host == DOCKER_HUB else location.host
        self._base = f"{'http' if is_loopback(host) else 'https'}://{host}/v2/{location.path}"
        self._own = httpx.URL(self._base)
        self._list_limit = httpx.Timeout(list_limit_s, connect=min(CONNECT_LIMIT_S, list_limit_s))
        self._client = httpx.Client(timeout=self._list_limit, headers={"Accept-Encoding": "identity"})
        self._access = RegistryAccess(location, allowed, self._client)

    def close(self) -> None:
        """As `Store.close`."""
        self._client.close()

    def files(self) -> list[RemoteFile]:
        """As `Store.files`."""
        if _REPOSITORY.fullmatch(self._location.path) is None:  # no registry has such a name
            raise NotThereError
        layers = _layers(self._manifest())
        files = [file for index, layer in enumerate(layers) if (file := self._file(index, layer)) is not None]
        if len({file.name for file in files}) < len(files):
            raise WrongAnswerError("its manifest has two layers of one name")
        if not files:
            raise NotThereError
        return files

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """As `Store.read`."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        limit = httpx.Timeout(READ_LIMIT_S, connect=CONNECT_LIMIT_S)
        with self._answer(f"/blobs/{file.version}", headers, limit, may_leave=True) as answer:
            nbytes = start
            for chunk in ranged_body(answer, start):
                nbytes += len(chunk)
                if file.nbytes is not None and nbytes > file.nbytes:
                    raise WrongAnswerError(
                        f"{file.name} has more than the {file.nbytes} bytes of its manifest"
                    )
                yield chunk

    def _manifest(self) -> dict[str, Any]:
        found = self._json(self._location.reference.removeprefix("@"))
        if found.get("mediaType") not in INDEX_TYPES and "manifests" not in found:
            return found
        listed = found.get("manifests")
        real = [one for one in listed if not _is_attestation(one)] if isinstance(listed, list) else []
        if len(real) != 1:
            raise WrongAnswerError(
                f"it is an index of {len(real)} manifests, name one of them by @sha256:HEX"
            )
        digest, _ = _descriptor(real[0])
        return self._json(digest)

    def _json(self, reference: str) -> dict[str, Any]:
        accept = {"Accept": ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))}
        with self._answer(f"/manifests/{reference}", accept, self._list_limit) as answer:
            data = body(answer, MAX_MANIFEST_NBYTES, "its manifest")
            digest = answer.headers.get("docker-content-digest", "")
        expected = reference if _DIGEST.fullmatch(reference) else digest
        found = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if _DIGEST.fullmatch(expected) and found != expected:
            raise WrongAnswerError(f"its manifest has the digest {found}, {expected} was asked for")
        try:
            manifest = json.loads(data)
        except (ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict):
            raise WrongAnswerError("its manifest is no JSON object")
        return manifest

    def _file(self, index: int, layer: Any) -> RemoteFile | None:
        digest, nbytes = _descriptor(layer)
        annotations, media_type = layer.get("annotations"), layer.get("mediaType")
        annotations = annotations if isinstance(annotations, dict) else {}
        name = next((annotations[key] for key in NAME_ANNOTATIONS if key in annotations), "")
        told = media_type if isinstance(media_type, str) else ""
        base, sha256 = _base_name(name), digest.removeprefix("sha256:")
        unpacks = annotations.get(UNPACK_ANNOTATION) == "true"
        if self._wanted.wants(base) and not unpacks:
            return RemoteFile(base, nbytes, digest, sha256=sha256)
        # ORAS calls plain files, which have a title, ".tar", and its Python client directories ".tar+gzip".
        is_tar = _TITLE not in annotations or base.endswith(ARCHIVE_ENDS) or told.endswith("gzip")
        if unpacks or (is_tar and _TAR.search(told)):
            return RemoteFile(f"layer-{index}.tar", nbytes, digest, sha256=sha256, is_archive=True)
        if told.endswith("tar+zstd"):
            raise WrongAnswerError("it has a layer packed with zstd, push it as tar, tar+gzip or files")
        return None

    @contextmanager
    def _answer(
        self, path: str, headers: dict[str, str], limit: httpx.Timeout, *, may_leave: bool = False
    ) -> Iterator[httpx.Response]:
        url, was_challenged = httpx.URL(f"{self._base}{path}"), False
        for _ in range(MAX_REDIRECTS + 2):
            is_own = (url.scheme, url.netloc) == (self._own.scheme, self._own.netloc)
            sent = self._access.headers if is_own else {}  # nobody else is told who asks
            asked = self._client.stream("GET", url, headers={**headers, **sent}, timeout=limit)
            with typed_errors(), asked as answer:
                if answer.status_code in REDIRECTS and may_leave:
                    url = self._redirected(answer)
                    continue
                if answer.status_code != httpx.codes.UNAUTHORIZED or not is_own or was_challenged:
                    check_status(answer, CREDENTIALS)
                    yield answer
                    return
                challenge = answer.headers.get("www-authenticate", "")
            was_challenged = True
            self._access.answer(challenge)
        raise WrongAnswerError(f"it redirects more than {MAX_REDIRECTS} times")

    def _redirected(self, answer: httpx.Response) -> httpx.URL:
        try:
            url = answer.url.join(answer.headers.get("location", ""))
        except httpx.InvalidURL:
            raise WrongAnswerError("it redirects to what can't be used") from None
        is_local = is_loopback(self._location.host)
        if url.scheme != "https" and not (url.scheme == "http" and is_local and is_loopback(url.host)):
            raise WrongAnswerError(f"it redirects to {printable(url.host, 100)}, which is not https")
        if not is_local and is_inside(url.host):
            raise WrongAnswerError(f"it redirects to {printable(url.host, 100)}, which is an address inside")
        return url


def _layers(manifest: dict[str, Any]) -> list[Any]:
    layers = manifest.get("layers")
    if not isinstance(layers, list):
        raise WrongAnswerError("its manifest has no list of layers")
    if len(layers) > MAX_LAYERS:
        raise WrongAnswerError(f"its manifest has more than {MAX_LAYERS} layers, the limit")
    return layers


def _descriptor(descriptor: Any) -> tuple[str, int]:
    """Digest and bytes."""
    digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
    nbytes = descriptor.get("size") if isinstance(descriptor, dict) else None
    if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
        raise WrongAnswerError("its manifest has a layer without a digest of sha256")
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0:
        raise WrongAnswerError("its manifest has a layer without a size")
    return digest, nbytes


def _is_attestation(manifest: Any) -> bool:
    annotations = manifest.get("annotations") if isinstance(manifest, dict) else None
    return isinstance(annotations, dict) and "vnd.docker.reference.type" in annotations


def _base_name(name: Any) -> str:
    """Of a file as it was called where it was pushed. Raises WrongAnswerError: it leaves that place."""
    if not isinstance(name, str):
        raise WrongAnswerError("its manifest has a layer whose name is no text")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise WrongAnswerError(
            f"its manifest has a layer named {printable(name, 100)!r}, which leads elsewhere"
        )
    return path.name
