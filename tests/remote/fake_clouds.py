"""`FakeCloud`: a bucket as Google Cloud Storage or Azure has it, of the calls that reading takes."""

from __future__ import annotations

import hashlib
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET: Final = "adapters-bucket"
ISO_TIME: Final = "2026-01-02T03:04:05.000Z"


class FakeCloud:
    """Serves `files` by key to who sends `authorization`; `refusals` are statuses of the next answers.

    A status of 0 refuses nothing.

    Args:
        kind: whose XML it speaks.
        authorization: what the header of this name begins with; None asks for none.
    """

    def __init__(self, kind: Literal["gs", "az"], authorization: str | None) -> None:
        self.kind = kind
        self.authorization = authorization
        self.files: dict[str, bytes] = {}
        self.refusals: list[int] = []
        self.ranges: list[str] = []
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                cloud.answer(self)

            def do_HEAD(self) -> None:
                cloud.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        sent = handler.headers.get("authorization", "")
        if self.refusals and (status := self.refusals.pop(0)):
            send(handler, status, b"<Error>no</Error>")
        elif self.authorization is not None and not sent.startswith(self.authorization):
            send(handler, 403 if self.kind == "az" else 401, b"<Error>who are you</Error>")
        elif bucket != BUCKET:
            send(handler, 404, b"<Error><Code>NoSuchBucket</Code></Error>")
        elif not key:
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            send(handler, 200, self._listed(query.get("prefix", "")).encode())
        elif key not in self.files:
            send(handler, 404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._send_file(handler, self.files[key])

    def _send_file(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        expected = handler.headers.get("if-match")
        if expected is not None and expected != etag(data):
            send(handler, 412, b"<Error>another one</Error>")
            return
        first, last, headers = (
            0,
            len(data) - 1,
            {"etag": etag(data), "last-modified": formatdate(usegmt=True)},
        )
        if asked := handler.headers.get("range"):
            self.ranges.append(asked)
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
            headers["content-range"] = f"bytes {first}-{last}/{len(data)}"
        send(handler, 206 if asked else 200, data[first : last + 1], headers)

    def _listed(self, prefix: str) -> str:
        below = [key for key in self.files if key.startswith(prefix)]
        here = [key for key in below if "/" not in key[len(prefix) :]]
        names = sorted({prefix + key[len(prefix) :].partition("/")[0] + "/" for key in below} - {*here})
        folders = [name for name in names if any(key.startswith(name) for key in below)]
        if self.kind == "gs":
            contents = "".join(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{ISO_TIME}</LastModified>"
                f"<ETag>{escape(etag(self.files[key]))}</ETag><Size>{len(self.files[key])}</Size></Contents>"
                for key in here
            )
            prefixes = "".join(
                f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders
            )
            return (
                f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}{prefixes}</ListBucketResult>"
            )
        blobs = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{formatdate(usegmt=True)}</Last-Modified>"
            f"<Content-Length>{len(self.files[key])}</Content-Length><Content-Type>x/y</Content-Type>"
            f"<Etag>{escape(etag(self.files[key]))}</Etag></Properties></Blob>"
            for key in here
        )
        prefixes = "".join(f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>" for name in folders)
        return f"<EnumerationResults><Blobs>{blobs}{prefixes}</Blobs><NextMarker/></EnumerationResults>"


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def send(
    handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str] | None = None
) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(data)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)
