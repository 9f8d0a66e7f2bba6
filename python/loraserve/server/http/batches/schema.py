"""Bodies of files and batches, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from loraserve.server.batches.records import BatchRecord, FileRecord, Status
from loraserve.server.http.request_body import RequestBody

MAX_METADATA = 16
MIN_LIFE_S = 3600
MAX_LIFE_S = 30 * 24 * 3600

MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class ExpiresAfter(RequestBody):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFE_S, le=MAX_LIFE_S)


class BatchBody(RequestBody):
    """A batch to be made; its input is a file of purpose batch, of lines that all ask one endpoint."""

    input_file_id: str = Field(max_length=128)
    endpoint: str = Field(max_length=256)
    completion_window: Literal["24h"]
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=MAX_METADATA)
    output_expires_after: ExpiresAfter | None = None


class FileAnswer(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class DeletedFile(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileList(BaseModel):
    """A page of files, newest first unless asked otherwise."""

    object: Literal["list"] = "list"
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class RequestCounts(BaseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class BatchAnswer(BaseModel):
    """A batch; times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """A page of batches, newest first."""

    object: Literal["list"] = "list"
    data: list[BatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_answer(record: FileRecord) -> FileAnswer:
    """As OpenAI shows a file."""
    return FileAnswer(
        id=record.id,
        bytes=record.nbytes,
        created_at=record.created_at,
        expires_at=record.expires_at,
        filename=record.filename,
        purpose=record.purpose,
    )


def batch_answer(record: BatchRecord) -> BatchAnswer:
    """As OpenAI shows a batch; its files once they are whole."""
    data = [problem.model_dump() for problem in record.problems]
    return BatchAnswer(
        id=record.id,
        endpoint=record.endpoint,
        errors={"object": "list", "data": data} if data else None,
        input_file_id=record.input_file_id,
        status=record.status,
        output_file_id=record.output_id if record.has_output and record.is_final else None,
        error_file_id=record.error_id if record.has_errors and record.is_final else None,
        created_at=record.created_at,
        in_progress_at=record.times.get("in_progress"),
        expires_at=record.expires_at,
        finalizing_at=record.times.get("finalizing"),
        completed_at=record.times.get("completed"),
        failed_at=record.times.get("failed"),
        expired_at=record.times.get("expired"),
        cancelling_at=record.times.get("cancelling"),
        cancelled_at=record.times.get("cancelled"),
        request_counts=RequestCounts(total=record.total, completed=record.completed, failed=record.failed),
        metadata=record.metadata,
    )
