"""Lines of a batch's input: read with bounded memory, checked, each a request or what is wrong with it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import orjson

from loraserve import _core
from loraserve.server.json_bounds import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, UNCOUNTED_NBYTES
from loraserve.validation.did_you_mean import did_you_mean
from loraserve.validation.printable import printable

MAX_LINE_NBYTES = 16 * 2**20  # of one request, with its line end
MAX_CUSTOM_ID_CHARS = 512
MAX_SHOWN_CHARS = 100
MAX_MESSAGE_CHARS = 500
FIELDS = ("custom_id", "method", "url", "body")
UTF8_BOM = b"\xef\xbb\xbf"

UrlCheck: TypeAlias = "Callable[[str], str | None]"
"""What is wrong with a line's url; None if nothing."""


@dataclass(frozen=True)
class Line:
    """A request: `number` counts the lines of the file from 1, `body` is JSON."""

    number: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True)
class BadLine:
    """A line that is no request, with its custom_id where that can be read; `param` is the field."""

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None


@dataclass
class InputFacts:
    """What a file holds.

    Args:
        fingerprint: of its bytes.
        num_lines: the number of its last line.
        num_requests: lines that are not blank.
        repeated: 64 bits of every custom_id that several lines have → the number of the first of them.
    """

    fingerprint: str = ""
    num_lines: int = 0
    num_requests: int = 0
    repeated: dict[int, int] = field(default_factory=dict)


class _LineError(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line without its end) of all that are not blank.

    None stands in place of a line over `MAX_LINE_NBYTES`.
    """
    number = 0
    while line := file.readline(MAX_LINE_NBYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(UTF8_BOM)
        if len(line) > MAX_LINE_NBYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(2**20)
            yield number, None
        elif stripped := line.strip(b" \t\r\n"):
            yield number, stripped


def read_lines(file: BinaryIO, facts: InputFacts, check_url: UrlCheck) -> Iterator[Line | BadLine]:
    """Every request of a file that was scanned, and what is wrong with lines that are none."""
    for number, raw in raw_lines(file):
        line = parse_line(number, raw, check_url)
        if facts.repeated and line.custom_id is not None:
            first = facts.repeated.get(_bits(line.custom_id), number)
            if first < number:
                text = f"custom_id {_shown(line.custom_id)} is that of line {first} already"
                yield BadLine(number, line.custom_id, "duplicate_custom_id", text, "custom_id")
                continue
        yield line


def scan(file: BinaryIO, on_line: Callable[[int, bytes | None], str | None]) -> InputFacts:
    """Reads a file once from its beginning.

    Args:
        file: binary, at its beginning.
        on_line: given each line that is not blank; its custom_id, None where there is none.
    """
    hashed = _Hashed(file)
    facts = InputFacts()
    bits, numbers = array("Q"), array("Q")
    for number, raw in raw_lines(hashed):  # type: ignore[arg-type]
        facts.num_lines = number
        facts.num_requests += 1
        custom_id = on_line(number, raw)
        if custom_id is not None:
            bits.append(_bits(custom_id))
            numbers.append(number)
    facts.fingerprint = hashed.fingerprint
    facts.repeated = _repeated(np.asarray(bits), np.asarray(numbers))
    return facts


def custom_id_of(number: int, raw: bytes | None) -> str | None:
    """The custom_id of a line, for `scan`: of a line that is whole otherwise or not."""
    return parse_line(number, raw, lambda _: None).custom_id


def parse_line(number: int, raw: bytes | None, check_url: UrlCheck) -> Line | BadLine:
    """The request of a line, or what is wrong with it; None is a line that was too long to be read."""
    custom_id: str | None = None
    try:
        values = _parsed(raw)
        custom_id = _custom_id(values)
        _check_fields(values, check_url)
    except _LineError as error:
        message = printable(f"line {number}: {error}", MAX_MESSAGE_CHARS)
        return BadLine(number, custom_id, error.code, message, error.param)
    return Line(number, custom_id, values["url"], orjson.dumps(values["body"]))


def _parsed(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        raise _LineError("line_too_long", f"it has more than {MAX_LINE_NBYTES} bytes, the limit")
    if len(raw) > UNCOUNTED_NBYTES:
        num_containers, num_commas, depth = _core.count_json(raw)
        for count, limit, what in (
            (num_containers, MAX_CONTAINERS, "objects and lists"),
            (num_commas, MAX_VALUES, "values"),
            (depth, MAX_DEPTH, "levels"),
        ):
            if count > limit:
                raise _LineError("line_too_long", f"it has {count} {what}, the limit is {limit}")
    try:
        values = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _LineError("invalid_json_line", f"it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise _LineError("invalid_json_line", "it is no JSON object")
    return values


def _custom_id(values: dict[str, Any]) -> str:
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        text = f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        raise _LineError("invalid_custom_id", text, "custom_id")
    return custom_id


def _check_fields(values: dict[str, Any], check_url: UrlCheck) -> None:
    for name in values.keys() - set(FIELDS):
        hint = did_you_mean(name, FIELDS) or f", these are: {', '.join(FIELDS)}"
        text = f"{_shown(name)} is no field of a line{hint}"
        raise _LineError("unknown_field", text, printable(name, MAX_SHOWN_CHARS))
    if values.get("method") != "POST":
        raise _LineError("invalid_method", 'method must be "POST"', "method")
    url, body = values.get("url"), values.get("body")
    problem = check_url(url) if isinstance(url, str) else "url must be a string, such as /v1/chat/completions"
    if problem is not None:
        raise _LineError("invalid_url", problem, "url")
    if not isinstance(body, dict):
        raise _LineError("invalid_body", "body must be a JSON object", "body")
    if body.get("stream"):
        raise _LineError("stream_not_supported", "stream must be left out: a batch has whole answers", "body")


def known_urls(urls: Collection[str]) -> UrlCheck:
    """Refuses all urls but these."""

    def check(url: str) -> str | None:
        if url in urls:
            return None
        return f"url {_shown(url)} is not served in batches, these are: {', '.join(sorted(urls))}"

    return check


def _shown(text: str) -> str:
    return repr(printable(text, MAX_SHOWN_CHARS))


def _bits(custom_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest(), "little")


def _repeated(bits: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> dict[int, int]:
    """The first number of all bits that are there more than once."""
    order = np.argsort(bits, kind="stable")
    ordered = bits[order]
    is_again = np.zeros(len(ordered), dtype=bool)
    is_again[1:] = ordered[1:] == ordered[:-1]
    is_first = ~is_again
    is_first[:-1] &= is_again[1:]
    is_first[-1:] = False
    return dict(zip(ordered[is_first].tolist(), numbers[order][is_first].tolist(), strict=True))


class _Hashed:
    """A file of which everything that is read is hashed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def readline(self, size: int) -> bytes:
        line = self._file.readline(size)
        self._hash.update(line)
        return line

    @property
    def fingerprint(self) -> str:
        return self._hash.hexdigest()[:16]
