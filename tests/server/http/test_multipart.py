"""Forms, cut at every place, and those that are none."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from loraserve.errors import InvalidRequestError
from loraserve.server.http.batches.multipart import MAX_FIELDS, MAX_HEADERS_NBYTES, MultipartForm

TYPE = 'multipart/form-data; boundary="b--"'
CONTENT = b"line one\r\n--b-\r\n--\r\n\r\nb--\n--b--"
FORM = (
    b"ignored\r\n--b--\r\nContent-Disposition: form-data; name=purpose\r\n\r\nbatch\r\n"
    b'--b-- \t\r\ncontent-disposition: form-data; name="file"; filename="my \xc3\xbc.jsonl"\r\n'
    b"content-type: application/octet-stream\r\n\r\n" + CONTENT + b"\r\n"
    b'--b--\r\ncontent-disposition: form-data; name="after"\r\n\r\n\r\n--b----\r\nignored'
)


def read(pieces: list[bytes], content_type: str = TYPE) -> tuple[bytes, MultipartForm]:
    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def run() -> tuple[bytes, MultipartForm]:
        form = MultipartForm(content_type, body(), "file")
        return b"".join([chunk async for chunk in form.file()]), form

    return asyncio.run(run())


def test_a_form_is_the_same_however_it_is_cut() -> None:
    cuts = [[FORM[:cut], FORM[cut:]] for cut in range(len(FORM))]
    for pieces in (*cuts, [bytes([byte]) for byte in FORM], [FORM]):
        content, form = read(pieces)
        assert content == CONTENT
        assert form.fields == {"purpose": "batch", "after": ""}
        assert form.filename is not None
        assert form.filename.endswith(".jsonl")


def test_a_form_that_ends_anywhere_before_its_end_is_broken() -> None:
    end = FORM.index(b"--b----") + len(b"--b----")
    for cut in range(end):
        with pytest.raises(InvalidRequestError, match="broken"):
            read([FORM[:cut]])
    assert read([FORM[:end]])[0] == CONTENT


def part(head: bytes, value: bytes = b"x") -> bytes:
    return b"--b--\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (part(b"content-type: text/plain"), "a part has no name"),
        (part(b'content-disposition: attachment; name="file"'), "a part has no name"),
        (part(b"content-disposition: form-data"), "a part has no name"),
        (part(b"content-disposition: form-data; name=a") * 2, "field 'a' twice"),
        (part(b"content-disposition: form-data; name=file; filename=a") * 2, "two fields 'file'"),
        (part(b"content-disposition: form-data; name=a", b"x" * 5000), "more than 4096 bytes"),
        (part(b"content-disposition: form-data; name=a", b"\xff"), "not UTF-8"),
        (part(b"x: " + b"y" * MAX_HEADERS_NBYTES), "headers"),
        (
            b"".join(part(b"content-disposition: form-data; name=%d" % i) for i in range(MAX_FIELDS + 1)),
            "fields",
        ),
        (b"--b--x\r\n", "followed by more"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(form: bytes, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        read([form + b"--b----\r\n"])


def test_what_is_held_is_bounded() -> None:
    sizes: list[int] = []

    async def run() -> None:
        async def body() -> AsyncIterator[bytes]:
            yield part(b"content-disposition: form-data; name=file; filename=a", b"")[:-2]
            for _ in range(64):
                sizes.append(len(form._buffer))
                yield b"\r\n--b-" * 16384
            yield b"\r\n--b----"

        form = MultipartForm(TYPE, body(), "file")
        assert sum([len(chunk) async for chunk in form.file()]) == 64 * 6 * 16384

    asyncio.run(run())
    assert max(sizes) < 2 * 2**20
