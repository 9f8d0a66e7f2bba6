"""Files and batches by OpenAI's client: their lives, bad inputs, tenants, bounds, restarts."""

import asyncio
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from loraserve.errors import BatchFileError, StateError
from loraserve.server.batches import records, service, store
from loraserve.server.batches.lines import MAX_LINE_NBYTES
from loraserve.server.batches.results import ResultFile
from loraserve.server.batches.store import BatchStore
from loraserve.settings.entries import ApiKey
from openai import OpenAI

from tests.server.batches.inputs import line
from tests.server.http.fake_engine import FakeEngine
from tests.server.http.http_thread import HttpThread

COMPLETIONS: Any = "/v1/completions"
KEYS = [
    ApiKey(name="ann", secret="ann-key"),
    ApiKey(name="bob", secret="bob-key", adapters=("one",), base_model=False),
    ApiKey(name="root", secret="root-key", is_admin=True),
]


@contextmanager
def served(path: Path, **options: Any) -> Iterator[HttpThread]:
    with HttpThread(FakeEngine, batch_dir=path / "batches", **options) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpThread]:
    with served(tmp_path) as server:
        yield server


def client_of(server: HttpThread, key: str = "unused") -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def upload(client: OpenAI, data: bytes, **options: Any) -> str:
    return client.files.create(file=("my input.jsonl", data), purpose="batch", **options).id


def begin(client: OpenAI, data: bytes, **options: Any) -> str:
    file = upload(client, data)
    return client.batches.create(
        input_file_id=file, endpoint=COMPLETIONS, completion_window="24h", **options
    ).id


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def ended(client: OpenAI, batch_id: str) -> Any:
    def final() -> Any:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in records.FINAL else None

    return wait_for(final)


def results(client: OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    found = [json.loads(one) for one in client.files.content(file_id).text.splitlines()]
    assert len({one["id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


def test_a_batch_from_its_input_to_its_output(server: HttpThread) -> None:
    client = client_of(server)
    data = b"\n".join(
        [
            line("a", "one two"),
            line("b", "x", model="one"),
            line("refused", "x", nonsense=1),
            line("unknown", "refuse AdapterNotFoundError"),
        ]
    )
    file = client.files.create(file=("my input.jsonl", data), purpose="batch")
    assert (file.bytes, file.filename, file.purpose, file.status) == (
        len(data),
        "my input.jsonl",
        "batch",
        "processed",
    )
    assert client.files.content(file.id).content == data
    created = client.batches.create(
        input_file_id=file.id, endpoint=COMPLETIONS, completion_window="24h", metadata={"for": "a test"}
    )
    assert created.status in ("validating", "in_progress")
    assert created.expires_at == created.created_at + 24 * 3600
    batch = ended(client, created.id)
    assert batch.status == "completed"
    assert batch.metadata == {"for": "a test"}
    assert batch.errors is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 2, 2)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times)
    output = results(client, batch.output_file_id)
    assert output["a"]["response"]["body"]["choices"][0]["text"] == "onetwo"
    assert output["b"]["response"]["body"]["model"] == "one"
    errors = results(client, batch.error_file_id)
    assert {name: one["response"]["status_code"] for name, one in errors.items()} == {
        "refused": 400,
        "unknown": 404,
    }
    assert [one.id for one in client.batches.list()] == [created.id]
    outputs = client.files.retrieve(batch.output_file_id), client.files.retrieve(batch.error_file_id)
    assert [one.purpose for one in outputs] == ["batch_output"] * 2
    assert outputs[0].filename == f"{created.id}_output.jsonl"


def test_files_are_listed_in_pages_and_deleted(server: HttpThread) -> None:
    client = client_of(server)
    ids = [upload(client, line(str(index))) for index in range(5)]
    found = [one.id for one in client.files.list(limit=2)]
    assert sorted(found) == sorted(ids)
    assert [one.id for one in client.files.list(limit=2, order="asc")] == found[::-1]
    assert [*client.files.list(purpose="batch_output")] == []
    assert client.files.delete(ids[0]).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            call(ids[0])
    with pytest.raises(openai.NotFoundError, match="after is"):
        client.files.list(after="file-none")
    batches = [begin(client, line("x")) for _ in range(5)]
    assert sorted(one.id for one in client.batches.list(limit=2)) == sorted(batches)


def test_an_input_that_is_wrong_fails_with_its_lines(server: HttpThread) -> None:
    client = client_of(server)
    other = line("4").replace(b"/v1/completions", b"/v1/chat/completions")
    bad = b"\n".join(
        [line("1"), b"nonsense", b"", line("1"), b'{"custom_id":"2"}', other, b"\0\0", line("7", stream=True)]
    )
    batch = ended(client, begin(client, bad))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None
    assert [(one.line, one.code) for one in batch.errors.data] == [
        (2, "invalid_json_line"),
        (5, "invalid_method"),
        (6, "invalid_url"),
        (7, "invalid_json_line"),
        (8, "stream_not_supported"),
    ]
    twice = ended(client, begin(client, line("1") + b"\r\n" + line("1")))
    assert [(one.line, one.code, one.param) for one in twice.errors.data] == [
        (2, "duplicate_custom_id", "custom_id")
    ]
    empty = ended(client, begin(client, b"\n\n"))
    assert [one.code for one in empty.errors.data] == ["empty_file"]
    long = ended(client, begin(client, line("1", "x" * MAX_LINE_NBYTES)))
    assert [one.code for one in long.errors.data] == ["line_too_long"]
    many = ended(client, begin(client, b"x\n" * 1000))
    assert len(many.errors.data) == service.MAX_PROBLEMS
    fine = ended(client, begin(client, b"\xef\xbb\xbf" + line("1") + b"\r\n\r\n" + line("2") + b"\r\n"))
    assert (fine.status, fine.request_counts.total) == ("completed", 2)


def test_more_lines_than_the_limit_fail(server: HttpThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_LINES", 2)
    batch = ended(client_of(server), begin(client_of(server), b"\n".join([line("1"), line("2"), line("3")])))
    assert [one.code for one in batch.errors.data] == ["too_many_requests"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"endpoint": "/adapters"}, "endpoint '/adapters' is not served in batches"),
        ({"endpoint": "/v1/batches"}, "is not served in batches"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-none"}, "there is no file 'file-none'"),
        ({"input_file_id": "../../etc/passwd"}, "there is no file"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
        ({"nonsense": 1}, "nonsense: unknown field"),
    ],
)
def test_a_batch_that_can_t_be_is_refused(server: HttpThread, fields: dict[str, Any], text: str) -> None:
    file = upload(client_of(server), line("1"))
    body = {"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h", **fields}
    answer = httpx.post(f"{server.url}/v1/batches", json=body)
    assert answer.status_code in (400, 404)
    assert text in answer.json()["error"]["message"]
    assert [*client_of(server).batches.list()] == []


@pytest.mark.parametrize(
    ("data", "files", "text"),
    [
        ({}, {"file": b"x"}, "purpose is missing"),
        ({"purpose": "fine-tune"}, {"file": b"x"}, "purpose is 'fine-tune'"),
        ({"purpose": "batch"}, {"nofile": b"x"}, "the form has no file"),
        ({"purpose": "batch", "more": "x"}, {"file": b"x"}, "field 'more' is unknown"),
        ({"purpose": "batch", "expires_after[seconds]": "60"}, {"file": b"x"}, "expires_after"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            {"file": b"x"},
            "must be from 3600",
        ),
    ],
)
def test_a_file_that_can_t_be_is_refused_and_leaves_nothing(
    server: HttpThread, tmp_path: Path, data: Any, files: Any, text: str
) -> None:
    answer = httpx.post(f"{server.url}/v1/files", data=data, files=files)
    assert answer.status_code == 400
    assert text in answer.json()["error"]["message"]
    assert [*(tmp_path / "batches/files").iterdir()] == []
    assert server.batches.store.nbytes == 0


def test_expiry_of_a_file_can_be_said(
    server: HttpThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(server)
    monkeypatch.setattr(service, "LOOK_S", 0.05)
    file = client.files.create(
        file=("x", line("1")), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    server.batches.store.files[file.id].expires_at = 0
    wait_for(lambda: not [*client.files.list()], 30)
    wait_for(lambda: not [*(tmp_path / "batches/files").iterdir()])


def test_a_form_that_is_cut_leaves_nothing(server: HttpThread, tmp_path: Path) -> None:
    head = b'--B\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nabc'
    for body in (b"", b"--B", head, head + b"\r\n--B", b"--C--\r\n"):
        answer = httpx.post(
            f"{server.url}/v1/files",
            content=body,
            headers={"content-type": "multipart/form-data; boundary=B"},
        )
        assert answer.status_code == 400
        assert "the form is broken" in answer.json()["error"]["message"]
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=" + 71 * "B", ""):
        answer = httpx.post(f"{server.url}/v1/files", content=head, headers={"content-type": kind})
        assert answer.status_code == 415
    assert [*(tmp_path / "batches/files").iterdir()] == []


@pytest.mark.parametrize("path", ["/v1/files", "/nowhere"])
def test_a_client_that_sends_on_and_closes_then_sees_why(server: HttpThread, path: str) -> None:
    address = httpx.URL(server.url)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        "content-type: multipart/form-data; boundary=B\r\ncontent-length: 40000000\r\n\r\n"
    )
    with socket.create_connection((address.host, address.port), 20.0) as connection:
        connection.sendall(head.encode())
        connection.sendall(b"--B\r\nno-name: x\r\n\r\n")
        for _ in range(38):
            connection.sendall(b"x" * 2**20)
        assert b" 400 " in connection.recv(100) if path == "/v1/files" else b" 404 " in connection.recv(100)


def test_files_are_bounded_in_size_and_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_FILE_NBYTES", 2**20)
    monkeypatch.setattr(store, "MAX_FILES", 3)
    with served(tmp_path, keys=KEYS, batch_dir_nbytes=5 * 2**19) as server:
        client = client_of(server, "ann-key")
        with pytest.raises(openai.BadRequestError, match="more than 1048576 bytes"):
            upload(client, b"x" * (2**20 + 1))
        first = upload(client, b"x" * 2**20)
        with pytest.raises(openai.BadRequestError, match="your files take .* the limit is 1310720"):
            upload(client, b"x" * 2**20)
        upload(client_of(server, "bob-key"), b"x" * 2**20)
        with pytest.raises(openai.BadRequestError, match="all files take"):
            upload(client_of(server, "root-key"), b"x" * 2**20)
        client.files.delete(first)
        for _ in range(3):
            upload(client, b"x")
        with pytest.raises(openai.BadRequestError, match="the limit is 3"):
            upload(client, b"x")
        assert server.batches.store.nbytes == 2**20 + 3


def test_batches_that_are_not_done_are_bounded(server: HttpThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_UNFINISHED", 2)
    client = client_of(server)
    first = begin(client, line("1", "hang"))
    begin(client, line("1", "hang"))
    with pytest.raises(openai.RateLimitError, match="the limit is 2"):
        begin(client, line("1", "hang"))
    client.batches.cancel(first)
    ended(client, first)
    begin(client, line("1", "hang"))


def test_results_that_find_no_room_fail_the_batch_and_what_is_done_stays(tmp_path: Path) -> None:
    data = b"\n".join(line(str(index), "x") for index in range(200))
    with served(tmp_path, batch_dir_nbytes=len(data) + 5000) as server:
        client = client_of(server)
        batch = ended(client, begin(client, data))
        assert batch.status == "failed"
        assert "files take" in batch.errors.data[0].message
        done = results(client, batch.output_file_id)
        assert 0 < len(done) == batch.request_counts.completed < 200


def test_a_cancelled_batch_keeps_what_is_done(server: HttpThread) -> None:
    client = client_of(server)
    batch_id = begin(client, b"\n".join([line("a"), line("b"), *(line(str(i), "hang") for i in range(9))]))
    wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed == 2)
    with pytest.raises(openai.BadRequestError, match="cancel that first"):
        client.files.delete(client.batches.retrieve(batch_id).input_file_id)
    assert client.batches.cancel(batch_id).status == "cancelling"
    batch = ended(client, batch_id)
    assert batch.status == "cancelled"
    assert batch.cancelling_at <= batch.cancelled_at
    assert set(results(client, batch.output_file_id)) == {"a", "b"}
    assert all(stream.aborted.is_set() for stream in server.engine.streams[2:])
    with pytest.raises(openai.BadRequestError, match="it can't be cancelled"):
        client.batches.cancel(batch_id)


def test_an_expired_batch_tells_which_lines_were_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LOOK_S", 0.05)
    with served(tmp_path) as server:
        client = client_of(server)
        batch_id = begin(client, b"\n".join([line("a"), line("b", "hang"), line("c", "hang")]))
        wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed == 1)
        server.batches.store.batches[batch_id].expires_at = 0
        batch = ended(client, batch_id)
        assert batch.status == "expired"
        assert set(results(client, batch.output_file_id)) == {"a"}
        errors = results(client, batch.error_file_id)
        assert {name: one["error"]["code"] for name, one in errors.items()} == {
            "b": "batch_expired",
            "c": "batch_expired",
        }
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)


def test_nobody_sees_anothers(tmp_path: Path) -> None:
    with served(tmp_path, keys=KEYS) as server:
        ann, others = (
            client_of(server, "ann-key"),
            [client_of(server, f"{name}-key") for name in ("bob", "root")],
        )
        file = upload(ann, line("1"))
        batch = ann.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h").id
        output = ended(ann, batch).output_file_id
        for other in others:
            assert [*other.files.list()] == []
            assert [*other.batches.list()] == []
            for call in (other.files.retrieve, other.files.content, other.files.delete):
                for name in (file, output):
                    with pytest.raises(openai.NotFoundError):
                        call(name)
            for call in (other.batches.retrieve, other.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    call(batch)
            with pytest.raises(openai.NotFoundError):
                other.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h")
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "none").files.list()


def test_lines_may_what_their_creator_may(tmp_path: Path) -> None:
    with served(tmp_path, keys=KEYS) as server:
        bob = client_of(server, "bob-key")
        batch = ended(
            bob, begin(bob, b"\n".join([line("mine", model="one"), line("other", model="two"), line("base")]))
        )
        assert set(results(bob, batch.output_file_id)) == {"mine"}
        errors = results(bob, batch.error_file_id)
        assert {one["response"]["status_code"] for one in errors.values()} == {403}
        assert {request.tenant for request in server.engine.requests} == {"bob"}


def test_a_rate_of_requests_holds_for_lines_which_wait(tmp_path: Path) -> None:
    keys = [ApiKey(name="k", secret="k", requests_per_minute=240)]
    with served(tmp_path, keys=keys) as server:
        client = client_of(server, "k")
        batch = ended(client, begin(client, b"\n".join(line(str(index)) for index in range(245))))
        assert (batch.status, batch.request_counts.completed) == ("completed", 245)


def test_a_restart_goes_on_and_answers_no_line_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\n".join([*(line(str(i)) for i in range(6)), *(line(f"h{i}", "hang") for i in range(6))])
    with served(tmp_path) as server:
        client = client_of(server)
        batch_id = begin(client, data)
        wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed == 6)
        cancelled = begin(client, b"\n".join([line("a"), line("b", "hang")]))
        with pytest.raises(StateError, match="another server's"):
            BatchStore(tmp_path / "batches", 2**30)
    for path in (tmp_path / "batches/files").glob("*.jsonl"):
        if path.read_bytes().startswith(b'{"id"'):
            path.write_bytes(path.read_bytes() + b'{"id":"batch_req_torn')
    (tmp_path / "batches/files/file-part.jsonl").write_bytes(b"an upload that was cut")
    record = tmp_path / "batches/batches" / f"{cancelled}.json"
    record.write_text(record.read_text().replace('"status":"in_progress"', '"status":"cancelling"'))
    killed = tmp_path / "batches/batches" / f"{batch_id}.json"
    killed.write_text(killed.read_text().replace('"completed":6', '"completed":0'))
    told: dict[str, int] = {}
    begin_run = service.BatchService._begin

    def note(self: service.BatchService, record: records.BatchRecord) -> None:
        told.setdefault(record.id, record.completed)
        begin_run(self, record)

    monkeypatch.setattr(service.BatchService, "_begin", note)
    with served(tmp_path) as server:
        client = client_of(server)
        assert ended(client, cancelled).status == "cancelled"
        wait_for(lambda: len(server.engine.requests) >= 4)
        assert {request.prompt for request in server.engine.requests} == {"hang"}
        assert client.batches.retrieve(batch_id).request_counts.completed == 6
        assert told[batch_id] == 6
        assert not (tmp_path / "batches/files/file-part.jsonl").exists()


def test_a_key_that_is_gone_fails_its_batches(tmp_path: Path) -> None:
    with served(tmp_path, keys=KEYS) as server:
        batch_id = begin(client_of(server, "ann-key"), line("1", "hang"))
    with served(tmp_path, keys=KEYS[1:]) as server:
        wait_for(lambda: server.batches.store.batches[batch_id].status == "failed")
        assert "none of this server's" in server.batches.store.batches[batch_id].problems[0].message
    with served(tmp_path, keys=KEYS) as server:
        assert client_of(server, "ann-key").batches.retrieve(batch_id).status == "failed"


def test_a_damaged_record_is_named_at_the_start(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        file = upload(client_of(server), line("1"))
    for text in ("{", "{}", '{"id": 1}'):
        (tmp_path / f"batches/files/{file}.json").write_text(text)
        with pytest.raises(StateError, match=f"{file}.json is damaged"):
            BatchStore(tmp_path / "batches", 2**30)


def test_without_a_directory_there_are_no_batches() -> None:
    with HttpThread(FakeEngine) as server, pytest.raises(openai.NotFoundError, match="--batch-dir"):
        upload(client_of(server), line("1"))


def test_metrics_tell_of_batches(server: HttpThread) -> None:
    client = client_of(server)
    ended(client, begin(client, b"\n".join([line("a"), line("b", "refuse AdapterNotFoundError")])))
    counts = server.batches.counts()
    assert counts.by_status == {"completed": 1}
    assert counts.lines == {"completed": 1, "failed": 1}
    assert counts.num_running_lines == counts.num_waiting_lines == 0
    assert counts.nbytes == server.batches.store.nbytes > 0


def test_a_large_file_comes_back_as_it_was(server: HttpThread) -> None:
    data = b"\n".join(line(str(index), "x\r\n--" * 50) for index in range(20_000))
    client = client_of(server)
    file = client.files.create(file=io.BytesIO(data), purpose="batch")
    assert client.files.content(file.id).content == data


@pytest.mark.parametrize("last", range(1, 7))
def test_an_end_at_any_write_of_a_record_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """The last of: created, in progress, finalizing, two files, completed."""
    data = b"\n".join([line("a"), line("b"), line("c", "refuse AdapterNotFoundError")])
    save, num_saves = BatchStore._save, 0

    async def save_some(self: BatchStore, *arguments: Any) -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves > last:
            await asyncio.Event().wait()
        await save(self, *arguments)

    with served(tmp_path) as server:
        client = client_of(server)
        file = upload(client, data)
        monkeypatch.setattr(BatchStore, "_save", save_some)
        batch_id = client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h").id
        wait_for(lambda: num_saves > last or server.batches.store.batches[batch_id].is_final)
    monkeypatch.undo()
    assert num_saves == min(last + 1, 6)
    with served(tmp_path) as server:
        client = client_of(server)
        batch = ended(client, batch_id)
        assert batch.status == "completed"
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        assert set(results(client, batch.output_file_id)) == {"a", "b"}
        assert set(results(client, batch.error_file_id)) == {"c"}
        assert len([*client.files.list()]) == 3


def test_a_disk_that_is_full_for_a_while_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "RETRY_S", 0.05)
    real_write, real_replace, num_left = ResultFile.append, store.replace_file, 6

    def fail_sometimes() -> None:
        nonlocal num_left
        num_left -= 1
        if num_left > 0 and num_left % 2:
            raise OSError(28, "No space left on device")

    def append(self: ResultFile, data: bytes) -> None:
        try:
            fail_sometimes()
        except OSError as error:
            raise BatchFileError(f"out can't be written: {error.strerror}") from error
        real_write(self, data)

    def replace(*arguments: Any) -> None:
        fail_sometimes()
        real_replace(*arguments)

    with served(tmp_path) as server:
        client = client_of(server)
        file = upload(client, b"\n".join(line(str(index)) for index in range(20)))
        monkeypatch.setattr(ResultFile, "append", append)
        monkeypatch.setattr(store, "replace_file", replace)
        with pytest.raises(openai.InternalServerError, match="can't be written: No space left on device"):
            client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h")
        assert [*client.batches.list()] == []
        created = client.batches.create(input_file_id=file, endpoint=COMPLETIONS, completion_window="24h")
        batch = ended(client, created.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 20)
        assert num_left < 0
        assert len(results(client, batch.output_file_id)) == 20
