"""Files brought whole from a store that fails, cuts, stalls, changes and lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from loraserve.errors import AdapterFormatError
from loraserve.remote.location import parse_remote
from loraserve.remote.store import (
    ChangedError,
    DeniedError,
    NotThereError,
    RemoteFile,
    TransientError,
    WantedFiles,
)
from loraserve.remote.transfer import MAX_TRIES, Transfer

DATA = bytes(range(256)) * 40
PIECE = 1000


class FakeStore:
    """One version of files; `faults` come one for each read or list, None being none."""

    def __init__(self, files: dict[str, bytes], faults: list[object] | None = None) -> None:
        self.contents, self.faults, self.num_read, self.version = files, faults or [], 0, 1

    def _fault(self) -> object:
        return self.faults.pop(0) if self.faults else None

    def close(self) -> None:
        pass

    def files(self) -> list[RemoteFile]:
        if isinstance(fault := self._fault(), Exception):
            raise fault
        return [RemoteFile(name, len(data), f"v{self.version}") for name, data in self.contents.items()]

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        if file.version != f"v{self.version}":
            raise ChangedError
        fault, data = self._fault(), self.contents[file.name]
        for offset in range(start, len(data), PIECE):
            piece = data[offset : offset + PIECE]
            self.num_read += len(piece)
            yield piece
            if fault == "change":
                self.version += 1
                self.contents = {name: data[::-1] for name, data in self.contents.items()}
                raise ChangedError
            if fault == "cut":
                return
            if isinstance(fault, Exception):
                raise fault


def transfer(store: FakeStore, directory: Path, max_nbytes: int = 10**6) -> Transfer:
    wanted = WantedFiles(wants=lambda _: True, names=(), index="", max_nbytes=max_nbytes)
    location = parse_remote("s3://bucket/sql")
    return Transfer(location, store, directory, wanted, lambda *_: None, sleep=lambda _: None)


def test_files_come_as_they_are(tmp_path: Path) -> None:
    store = FakeStore({"a": DATA, "b": b"", "c": b"x"})
    transfer(store, tmp_path / "part").run()
    assert {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir()} == store.contents


def test_a_source_that_is_given_up_meanwhile_is_not_tried_again(tmp_path: Path) -> None:
    told: list[TransientError] = []
    store = FakeStore({"a": DATA}, [TransientError("away") for _ in range(3)])
    wanted = WantedFiles(wants=lambda _: True, names=(), index="", max_nbytes=10**6)
    given_up = Transfer(
        parse_remote("s3://bucket/sql"),
        store,
        tmp_path,
        wanted,
        lambda *_: None,
        on_failure=told.append,
        goes_on=lambda: len(told) < 2,
        sleep=lambda _: None,
    )
    with pytest.raises(TransientError, match="away"):
        given_up.run()
    assert (len(told), len(store.faults)) == (2, 1)


@pytest.mark.parametrize("fault", ["cut", TransientError("reset")])
def test_a_cut_read_goes_on_where_it_ended(tmp_path: Path, fault: object) -> None:
    store = FakeStore({"a": DATA}, [None, *[fault] * 8])
    transfer(store, tmp_path).run()
    assert (tmp_path / "a").read_bytes() == DATA
    assert store.num_read == len(DATA)


def test_another_transfer_goes_on_where_one_gave_up(tmp_path: Path) -> None:
    class Silent(FakeStore):
        def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
            if start >= 5 * PIECE:
                raise TransientError("down")
            yield self.contents[file.name][start : start + PIECE]

    with pytest.raises(TransientError):
        transfer(Silent({"a": DATA}), tmp_path).run()
    store = FakeStore({"a": DATA})
    transfer(store, tmp_path).run()
    assert (tmp_path / "a").read_bytes() == DATA
    assert store.num_read == len(DATA) - 5 * PIECE


def test_parts_of_another_version_are_not_gone_on_with(tmp_path: Path) -> None:
    store = FakeStore({"a": DATA}, [None, "cut", *[TransientError("down")] * 3])
    store.read = lambda *_: (_ for _ in ()).throw(TransientError("down"))  # type: ignore[method-assign]
    (tmp_path / "a").write_bytes(b"of something else")
    with pytest.raises(TransientError):
        transfer(store, tmp_path).run()
    newer = FakeStore({"a": DATA[::-1]})
    newer.version = 7
    transfer(newer, tmp_path).run()
    assert (tmp_path / "a").read_bytes() == DATA[::-1]


def test_what_changes_meanwhile_is_read_anew(tmp_path: Path) -> None:
    store = FakeStore({"a": DATA, "b": DATA}, [None, None, "change"])
    transfer(store, tmp_path).run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == store.contents


def test_what_changes_all_the_time_is_refused(tmp_path: Path) -> None:
    store = FakeStore({"a": DATA}, [None, "change"] * 20)
    with pytest.raises(AdapterFormatError, match="changed 3 times"):
        transfer(store, tmp_path).run()


@pytest.mark.parametrize("error", [NotThereError(), DeniedError("no")])
def test_a_refusal_is_not_asked_again(tmp_path: Path, error: Exception) -> None:
    store = FakeStore({"a": DATA}, [error])
    with pytest.raises(type(error)):
        transfer(store, tmp_path).run()
    assert store.faults == []


def test_tries_are_bounded(tmp_path: Path) -> None:
    store = FakeStore({"a": DATA}, [TransientError("down")] * 100)
    with pytest.raises(TransientError):
        transfer(store, tmp_path).run()
    assert len(store.faults) == 100 - MAX_TRIES


@pytest.mark.parametrize("is_told", [True, False])
def test_too_much_is_refused(tmp_path: Path, is_told: bool) -> None:
    store = FakeStore({"a": DATA})
    if not is_told:
        store.files = lambda: [RemoteFile("a", None, None)]  # type: ignore[method-assign]
        store.read = lambda *_: iter([bytes(PIECE)] * 10**6)  # type: ignore[method-assign]
    with pytest.raises(AdapterFormatError, match="more than 5000 bytes"):
        transfer(store, tmp_path, max_nbytes=5000).run()
    assert not (tmp_path / "a").exists() or (tmp_path / "a").stat().st_size <= 5000 + PIECE


def test_what_sends_more_than_it_told_is_not_read_to_its_end(tmp_path: Path) -> None:
    store = FakeStore({"a": DATA})
    store.files = lambda: [RemoteFile("a", 2500, "v1")]  # type: ignore[method-assign]
    with pytest.raises(AdapterFormatError, match="changed 3 times"):
        transfer(store, tmp_path).run()
    assert store.num_read == 3 * 3 * PIECE
    assert (tmp_path / "a").stat().st_size == 0


@pytest.mark.parametrize("form", ["{sum}  a", "{sum} *a", "{sum}  ./a"])
def test_sums_are_compared(tmp_path: Path, form: str) -> None:
    good, bad = hashlib.sha256(DATA).hexdigest(), "0" * 64
    for digest in (good, good.upper(), bad):
        sums = f"{form.format(sum=digest)}\n{bad}  not-there\n{bad}  ../a\nno line\n".encode()
        run = transfer(FakeStore({"a": DATA, "SHA256SUMS": sums}), tmp_path / digest).run
        if digest == bad:
            with pytest.raises(AdapterFormatError, match="a is not what SHA256SUMS says"):
                run()
        else:
            run()
