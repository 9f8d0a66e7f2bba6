"""Files of results: what they hold is known again, what is torn is cut, what is not theirs is refused."""

import errno
import os
from pathlib import Path

import pytest
from loraserve.errors import BatchFileError
from loraserve.server.batches.lines import BadLine
from loraserve.server.batches.results import (
    Answer,
    DoneLines,
    ResultFile,
    answer_line,
    error_line,
)

from tests.server.batches.inputs import results_of

INPUT = "0123456789abcdef"


def answered(number: int, status: int = 200) -> bytes:
    return answer_line(INPUT, number, f"id {number}", Answer(status, "r", b'{"text":"x"}'))


def test_results_have_openais_form(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "out", INPUT)
    file.append(answered(1))
    file.append(error_line(INPUT, BadLine(7, None, "invalid_json_line", "line 7: it is not JSON")))
    file.close()
    assert results_of(tmp_path / "out") == [
        {
            "id": f"batch_req_{INPUT}_1",
            "custom_id": "id 1",
            "response": {"status_code": 200, "request_id": "r", "body": {"text": "x"}},
            "error": None,
        },
        {
            "id": f"batch_req_{INPUT}_7",
            "custom_id": None,
            "response": None,
            "error": {"code": "invalid_json_line", "message": "line 7: it is not JSON", "param": None},
        },
    ]


def test_a_file_is_gone_on_with_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "out"
    whole = answered(3) + answered(1, 400) + answered(20)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        file = ResultFile(path, INPUT)
        kept = whole[:length].count(b"\n")
        assert [number for number in range(30) if number in file.done] == sorted([3, 1, 20][:kept])
        assert (file.counts.completed, file.counts.failed) == (max(kept - 1, min(kept, 1)), int(kept > 1))
        file.append(answered(5))
        file.close()
        assert path.read_bytes() == b"".join(whole.splitlines(True)[:kept]) + answered(5)


def test_zeros_that_a_crash_of_the_machine_left_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(answered(1) + b"\0" * 5000 + b"\n" + answered(2))
    ResultFile(path, INPUT).close()
    assert path.read_bytes() == answered(1)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"my own notes\n", "no results of a batch"),
        (answered(1) + b"{}\n", "no results of a batch"),
        (answered(1).replace(INPUT.encode(), b"fedcba9876543210"), "results of another input"),
    ],
)
def test_what_is_something_else_is_left_alone_unless_told(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    with pytest.raises(BatchFileError, match=text):
        ResultFile(path, INPUT)
    assert path.read_bytes() == content
    ResultFile(path, INPUT, overwrites=True).close()
    assert path.read_bytes() == b""


def test_one_process_at_a_time_writes_a_file(tmp_path: Path) -> None:
    file = ResultFile(tmp_path / "out", INPUT)
    file.append(answered(1))
    for overwrites in (False, True):
        with pytest.raises(BatchFileError, match="by another process"):
            ResultFile(tmp_path / "out", INPUT, overwrites=overwrites)
    file.close()
    assert 1 in ResultFile(tmp_path / "out", INPUT).done


def test_a_line_that_does_not_fit_is_not_left_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ResultFile(tmp_path / "out", INPUT)
    file.append(answered(1))
    write = os.write

    def full_disk(descriptor: int, data: bytes) -> int:
        if len(data) < len(answered(2)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:10])

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(BatchFileError, match="can't be written: No space left"):
        file.append(answered(2))
    monkeypatch.undo()
    assert (tmp_path / "out").read_bytes() == answered(1)
    file.append(answered(2))
    assert (tmp_path / "out").read_bytes() == answered(1) + answered(2)


def test_a_place_that_can_t_be_written_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none/out", tmp_path):
        with pytest.raises(BatchFileError, match="can't be opened"):
            ResultFile(path, INPUT)


def test_numbers_take_a_bit_each() -> None:
    done = DoneLines()
    for number in (1, 8, 9, 1_000_000):
        done.add(number)
    assert [number for number in range(12) if number in done] == [1, 8, 9]
    assert 1_000_000 in done
    assert 999_999 not in done
    assert 2_000_000 not in done
    assert len(done._bits) == 125_001
