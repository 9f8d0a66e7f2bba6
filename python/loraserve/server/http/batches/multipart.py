"""A form of one file and some fields (RFC 7578), read as it comes: the file's bytes are never held whole."""

from __future__ import annotations

import email.message
from collections.abc import AsyncIterator
from email.parser import HeaderParser

from fastapi import HTTPException

from loraserve.errors import InvalidRequestError

MAX_BOUNDARY_CHARS = 70  # RFC 2046
MAX_HEADERS_NBYTES = 4096  # of a part
MAX_FIELD_NBYTES = 4096
MAX_FIELDS = 16
CHUNK_NBYTES = 2**17


class MultipartForm:
    """Reads a form; `fields` and `filename` are whole once `file` has ended.

    Args:
        content_type: of the request.
        body: as it comes.
        file_field: the name of the field that is the file.

    Raises:
        HTTPException: 415 for another type of body.
    """

    def __init__(self, content_type: str, body: AsyncIterator[bytes], file_field: str) -> None:
        header = email.message.Message()
        header["content-type"] = content_type or "none"
        boundary = header.get_boundary("")
        if header.get_content_type() != "multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY_CHARS:
            raise HTTPException(415, f"content-type is {content_type[:100]!r}, send multipart/form-data")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
        self._file_field = file_field
        self._body = body
        self._buffer = bytearray(b"\r\n")  # the first delimiter has no line before it
        self._is_over = False

    async def file(self) -> AsyncIterator[bytes]:
        """The file's content, in pieces. Raises InvalidRequestError: the form is not what it should be."""
        async for _ in self._part():  # what stands before the first delimiter
            pass
        num_parts = 0
        while await self._has_part():
            num_parts += 1
            if num_parts > MAX_FIELDS:
                raise InvalidRequestError(f"the form has more than {MAX_FIELDS} fields, the limit")
            name, filename = await self._headers()
            if name == self._file_field and filename is not None:
                if self.filename is not None:
                    raise InvalidRequestError(f"the form has two fields {name!r}, send one file at a time")
                self.filename = filename
                async for chunk in self._part():
                    yield chunk
            else:
                await self._field(name)
        if self.filename is None:
            raise InvalidRequestError(f"the form has no file, send one as the field {self._file_field!r}")

    async def _field(self, name: str) -> None:
        value = bytearray()
        async for chunk in self._part():
            value += chunk
            if len(value) > MAX_FIELD_NBYTES:
                raise InvalidRequestError(f"field {name!r:.100} has more than {MAX_FIELD_NBYTES} bytes")
        if name in self.fields:
            raise InvalidRequestError(f"the form has field {name!r:.100} twice")
        try:
            self.fields[name] = value.decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(f"field {name!r:.100} is not UTF-8") from None

    async def _part(self) -> AsyncIterator[bytes]:
        """What stands before the next delimiter, which is taken too."""
        delimiter = self._delimiter
        while (found := self._buffer.find(delimiter)) < 0:
            num_sure = len(self._buffer) - len(delimiter) + 1
            if num_sure >= CHUNK_NBYTES:
                yield bytes(self._buffer[:num_sure])
                del self._buffer[:num_sure]
            await self._more()
        for begin in range(0, found, CHUNK_NBYTES):
            yield bytes(self._buffer[begin : min(begin + CHUNK_NBYTES, found)])
        del self._buffer[: found + len(delimiter)]

    async def _has_part(self) -> bool:
        """Whether the delimiter that was taken is not the last one."""
        line = await self._until(b"\r\n", 256, optional_end=True)
        if line.startswith(b"--"):
            return False
        if line.strip(b" \t"):
            raise InvalidRequestError("the form is broken: a boundary is followed by more on its line")
        return True

    async def _headers(self) -> tuple[str, str | None]:
        """(name of the field, its filename) of the part that begins."""
        text = await self._until(b"\r\n\r\n", MAX_HEADERS_NBYTES)
        headers = HeaderParser().parsestr(text.decode(errors="replace"))
        disposition = headers.get("content-disposition", "")
        name = headers.get_param("name", header="content-disposition")
        if not disposition.lower().startswith("form-data") or not isinstance(name, str):
            raise InvalidRequestError("the form is broken: a part has no name")
        return name, headers.get_filename()

    async def _until(self, end: bytes, limit: int, *, optional_end: bool = False) -> bytes:
        """What stands before `end`, which is taken; of the last line of a form the end may be missing."""
        while (found := self._buffer.find(end)) < 0:
            if len(self._buffer) > limit:
                raise InvalidRequestError("the form is broken: a part has no end of its headers")
            if optional_end and self._buffer.startswith(b"--"):
                return b"--"
            await self._more()
        if found > limit:
            raise InvalidRequestError(f"the form is broken: headers of a part exceed {limit} bytes")
        text = bytes(self._buffer[:found])
        del self._buffer[: found + len(end)]
        return text

    async def _more(self) -> None:
        async for chunk in self._body:
            self._buffer += chunk
            return
        raise InvalidRequestError("the form is broken: it ends before its last boundary")
