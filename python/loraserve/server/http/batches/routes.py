"""OpenAI's routes of files and batches, each caller's own; off unless the server has a directory for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse

from loraserve.errors import InvalidRequestError, NotStoredError
from loraserve.server.access.keys import Caller
from loraserve.server.batches.records import MAX_FILE_NBYTES, BatchRecord, FileRecord
from loraserve.server.batches.service import BatchService
from loraserve.server.http.auth import current_caller
from loraserve.server.http.batches.multipart import MultipartForm
from loraserve.server.http.batches.schema import (
    MAX_LIFE_S,
    MIN_LIFE_S,
    BatchAnswer,
    BatchBody,
    BatchList,
    DeletedFile,
    FileAnswer,
    FileList,
    batch_answer,
    file_answer,
)
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.openai.openapi import OpenAIError, Responses
from loraserve.server.http.state import HttpState, http_state

FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
MAX_FILENAME_CHARS = 255
CONTENT_NBYTES = 256 * 2**10
JSONL = "application/jsonl"

ERRORS: Responses = {
    status: {"model": OpenAIError} for status in (400, 401, 404, 413, 415, 422, 429, 500, 503)
}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "A request a line."},
                        "purpose": {"enum": ["batch"]},
                        "expires_after[anchor]": {"enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": MIN_LIFE_S,
                            "maximum": MAX_LIFE_S,
                        },
                    },
                }
            }
        },
    }
}

Record = TypeVar("Record", FileRecord, BatchRecord)

router = APIRouter(prefix="/v1", tags=["batches"], route_class=JsonRoute, responses=ERRORS)


class Owned:
    """The batches of a server, as one caller sees them."""

    def __init__(self, service: BatchService, owner: str) -> None:
        self.service = service
        self.store = service.store
        self.owner = owner


async def owned(
    state: Annotated[HttpState, Depends(http_state)], caller: Annotated[Caller, Depends(current_caller)]
) -> Owned:
    """Raises NotStoredError: this server keeps no batches."""
    if state.batches is None:
        raise NotStoredError("this server keeps no files and batches, start it with --batch-dir DIRECTORY")
    return Owned(state.batches, state.access.owner_of(caller))


Mine = Annotated[Owned, Depends(owned)]
After = Annotated[str | None, Query(max_length=128, description="The id that the page begins behind.")]


@router.post("/files", openapi_extra=_FORM)
async def upload_file(request: Request, mine: Mine) -> FileAnswer:
    """Keeps a file of requests, a line each."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MAX_FILE_NBYTES + 2**16:
        raise InvalidRequestError(f"the file has more than {MAX_FILE_NBYTES} bytes, the limit")
    form = MultipartForm(request.headers.get("content-type", ""), request.stream(), "file")

    def told() -> tuple[str, int | None]:
        return (form.filename or "batch.jsonl")[:MAX_FILENAME_CHARS], _life_s(form.fields)

    return file_answer(await mine.store.upload(mine.owner, form.file(), told))


@router.get("/files")
async def list_files(
    mine: Mine,
    purpose: Literal["batch", "batch_output"] | None = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    """The caller's files."""
    records = [one for one in mine.store.files_of(mine.owner) if purpose in (None, one.purpose)]
    page, has_more = _page(records[::-1] if order == "asc" else records, after, limit)
    return FileList(
        data=[file_answer(one) for one in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=has_more,
    )


@router.get("/files/{file_id}")
async def get_file(file_id: str, mine: Mine) -> FileAnswer:
    """One of them."""
    return file_answer(mine.store.file(mine.owner, file_id))


@router.delete("/files/{file_id}")
async def delete_file(file_id: str, mine: Mine) -> DeletedFile:
    """Removes a file; of a batch that is not done the input stays."""
    record = mine.store.file(mine.owner, file_id)
    await mine.store.delete_file(record)
    return DeletedFile(id=record.id)


@router.get(
    "/files/{file_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {JSONL: {"schema": {"type": "string"}}}, "description": "The lines."}},
)
async def get_content(file_id: str, mine: Mine) -> Response:
    """A file's lines."""
    file = mine.store.open(mine.store.file(mine.owner, file_id))
    nbytes = os.fstat(file.fileno()).st_size

    def chunks() -> Iterator[bytes]:
        with file:
            while chunk := file.read(CONTENT_NBYTES):
                yield chunk

    return StreamingResponse(chunks(), media_type=JSONL, headers={"content-length": str(nbytes)})


@router.post("/batches")
async def create_batch(body: BatchBody, mine: Mine) -> BatchAnswer:
    """Begins with a file's requests, behind those that somebody waits for."""
    life = body.output_expires_after
    record = await mine.service.create(
        mine.owner, body.endpoint, body.input_file_id, body.metadata, None if life is None else life.seconds
    )
    return batch_answer(record)


@router.get("/batches")
async def list_batches(
    mine: Mine, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> BatchList:
    """The caller's batches, newest first."""
    page, has_more = _page(mine.store.batches_of(mine.owner), after, limit)
    return BatchList(
        data=[batch_answer(one) for one in page],
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=has_more,
    )


@router.get("/batches/{batch_id}")
async def get_batch(batch_id: str, mine: Mine) -> BatchAnswer:
    """One of them."""
    return batch_answer(mine.store.batch(mine.owner, batch_id))


@router.post("/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: str, mine: Mine) -> BatchAnswer:
    """Ends a batch; what is done of it becomes its output."""
    record = mine.store.batch(mine.owner, batch_id)
    await mine.service.cancel(record)
    return batch_answer(record)


def _page(records: list[Record], after: str | None, limit: int) -> tuple[list[Record], bool]:
    """Those behind `after`, and whether there are more. Raises NotStoredError: `after` is none of them."""
    begin = 0
    if after is not None:
        begin = next((index + 1 for index, one in enumerate(records) if one.id == after), 0)
        if begin == 0:
            raise NotStoredError(f"after is {after[:100]!r}, which is not in the list")
    return records[begin : begin + limit], len(records) > begin + limit


def _life_s(fields: dict[str, str]) -> int | None:
    """Seconds that a file is to be kept. Raises InvalidRequestError: a field is not what it may be."""
    for name in fields.keys() - set(FIELDS):
        raise InvalidRequestError(
            f"field {name[:100]!r} is unknown, known are {', '.join(('file', *FIELDS))}"
        )
    purpose = fields.get("purpose")
    if purpose != "batch":
        told = "is missing" if purpose is None else f"is {purpose[:100]!r}"
        raise InvalidRequestError(f"purpose {told}, files here are of purpose batch")
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at" or seconds is None or not seconds.isascii() or not seconds.isdigit():
        raise InvalidRequestError("expires_after must have anchor created_at and whole seconds")
    if not MIN_LIFE_S <= int(seconds[:12]) <= MAX_LIFE_S:
        raise InvalidRequestError(
            f"expires_after[seconds] is {seconds[:12]}, it must be from {MIN_LIFE_S} to {MAX_LIFE_S}"
        )
    return int(seconds)
