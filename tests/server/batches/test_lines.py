"""What is a line of a batch, and what is wrong with others."""

import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loraserve.server.batches import lines
from loraserve.server.batches.lines import BadLine, InputFacts, Line, known_urls, read_lines, scan
from loraserve.server.batches.results import error_line

from tests.server.batches.inputs import line

CHECK = known_urls({"/v1/completions", "/v1/chat/completions"})


def read(data: bytes) -> list[Line | BadLine]:
    file = io.BytesIO(data)
    facts = scan(file, lines.custom_id_of)
    file.seek(0)
    return list(read_lines(file, facts, CHECK))


def changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(line("1")), **fields}).encode()


def test_a_line_is_a_request() -> None:
    (one,) = read(line("1", "hello", max_tokens=3))
    assert isinstance(one, Line)
    assert (one.number, one.custom_id, one.url) == (1, "1", "/v1/completions")
    assert json.loads(one.body) == {"model": "base", "prompt": "hello", "max_tokens": 3}


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \n", b"\n\n", b"\n \t\r\n\n"])
def test_line_ends_blank_lines_and_a_byte_order_mark_are_no_part_of_requests(end: bytes) -> None:
    data = b"\xef\xbb\xbf" + line("1") + end + line("2") + end + line("3")
    found = read(data)
    assert [one.custom_id for one in found] == ["1", "2", "3"]
    assert all(isinstance(one, Line) for one in found)
    assert found[-1].number == data.count(b"\n") + 1


@pytest.mark.parametrize(
    ("raw", "code", "text"),
    [
        (b"nonsense", "invalid_json_line", "not JSON"),
        (b'{"custom_id": "1"', "invalid_json_line", "not JSON"),
        (b"\0" * 8, "invalid_json_line", "not JSON"),
        (line("1") + b"\0", "invalid_json_line", "not JSON"),
        (b"\xff\xfe" + line("1"), "invalid_json_line", "not JSON"),
        (b'"text"', "invalid_json_line", "no JSON object"),
        (b"[]", "invalid_json_line", "no JSON object"),
        (b"{}", "invalid_custom_id", "custom_id"),
        (changed(custom_id=1), "invalid_custom_id", "must be a string"),
        (changed(custom_id=""), "invalid_custom_id", "1 to 512"),
        (changed(custom_id="x" * 513), "invalid_custom_id", "1 to 512"),
        (changed(method="GET"), "invalid_method", "POST"),
        (changed(method=None), "invalid_method", "POST"),
        (changed(url="/v1/complétions"), "invalid_url", "not served in batches"),
        (changed(url="/adapters"), "invalid_url", "not served in batches"),
        (changed(url=7), "invalid_url", "must be a string"),
        (changed(body="x"), "invalid_body", "must be a JSON object"),
        (changed(body=None), "invalid_body", "must be a JSON object"),
        (changed(bodi={}), "unknown_field", "did you mean body"),
        (line("1", stream=True), "stream_not_supported", "stream"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "line_too_long", "5000 levels"),
        (line("1", "x", stop=["x"] * 300_000), "line_too_long", "values"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_and_ends_no_other(raw: bytes, code: str, text: str) -> None:
    first, bad, last = read(line("first") + b"\n" + raw + b"\n" + line("last") + b"\n")
    assert isinstance(first, Line)
    assert isinstance(last, Line)
    assert isinstance(bad, BadLine)
    assert (bad.number, bad.code) == (2, code)
    assert text in bad.message
    assert len(bad.message) <= lines.MAX_MESSAGE_CHARS


def test_a_line_over_the_limit_is_read_past_without_being_held() -> None:
    long = line("1", "x" * lines.MAX_LINE_NBYTES)
    _, bad, last = read(line("first") + b"\n" + long + b"\n" + line("last"))
    assert isinstance(bad, BadLine)
    assert (bad.code, last.custom_id, last.number) == ("line_too_long", "last", 3)
    assert isinstance(read(line("1", "x" * 10 * 2**20))[0], Line)


def test_a_custom_id_is_the_first_lines_that_has_it() -> None:
    data = b"\n".join([line("a"), line("b"), b"{}", line("a"), line("a", url=1), line("c"), line("b")])
    found = read(data)
    assert [one.number for one in found if isinstance(one, BadLine)] == [3, 4, 5, 7]
    assert isinstance(found[3], BadLine)
    assert found[3].code == "duplicate_custom_id"
    assert "of line 1 already" in found[3].message


def test_repeated_ids_are_found_among_many() -> None:
    draw = random.Random(5)
    ids = [str(draw.randrange(3000)) for _ in range(4000)]
    found = read(b"\n".join(line(one) for one in ids))
    seen: set[str] = set()
    for custom_id, one in zip(ids, found, strict=True):
        assert isinstance(one, BadLine if custom_id in seen else Line)
        seen.add(custom_id)


def test_the_fingerprint_is_of_all_bytes() -> None:
    def facts(data: bytes) -> InputFacts:
        return scan(io.BytesIO(data), lines.custom_id_of)

    assert facts(line("1")).fingerprint == facts(line("1")).fingerprint
    assert facts(line("1")).fingerprint != facts(line("1") + b"\n").fingerprint
    assert (facts(b"").num_requests, facts(b"\n\n").num_lines) == (0, 0)
    assert facts(b"\n" + line("1") + b"\n\n").num_requests == 1


def test_a_million_lines_take_little_memory(tmp_path: Path) -> None:
    import tracemalloc  # noqa: PLC0415

    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        for index in range(100_000):
            file.write(b'{"custom_id":"%d","method":"POST","url":"/v1/completions","body":{}}\n' % index)
    tracemalloc.start()
    with path.open("rb") as file:
        facts = scan(file, lines.custom_id_of)
        file.seek(0)
        assert sum(1 for _ in read_lines(file, facts, CHECK)) == 100_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 100_000


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [line("a"), line("b"), line(7), b"", b"{}", b"null", b'"x"', b"\xef\xbb\xbf", b" "]
            ),
            st.recursive(
                st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
                lambda inner: (
                    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
                ),
            ).map(lambda value: json.dumps(value).encode()),
            st.fixed_dictionaries(
                {},
                optional={
                    "custom_id": st.text(max_size=4) | st.integers(),
                    "method": st.sampled_from(["POST", "GET", 1]),
                    "url": st.sampled_from(["/v1/completions", "/", ""]) | st.text(max_size=5),
                    "body": st.dictionaries(st.text(max_size=3), st.integers(), max_size=2) | st.none(),
                },
            ).map(lambda value: json.dumps(value).encode()),
        ),
        max_size=12,
    ),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_whatever_is_in_a_file_each_line_is_a_request_or_says_what_is_wrong(
    parts: list[bytes], end: bytes
) -> None:
    data = end.join(parts)
    found = read(data)
    physical = data.removeprefix(lines.UTF8_BOM).split(b"\n")
    numbers = [number for number, raw in enumerate(physical, 1) if raw.strip(b" \t\r")]
    assert [one.number for one in found] == numbers
    ids = [one.custom_id for one in found if isinstance(one, Line)]
    assert len(set(ids)) == len(ids)
    for one in found:
        if isinstance(one, BadLine):
            assert one.message.isprintable()
            json.loads(error_line("0" * 16, one))
