"""Files and batches as they are kept on disk."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

Status: TypeAlias = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]

FINAL: frozenset[Status] = frozenset(("failed", "completed", "expired", "cancelled"))
COMPLETION_WINDOW_S = 24 * 3600
MAX_FILE_NBYTES = 512 * 2**20  # of an input
MAX_LINES = 1_000_000
FILE_LIFE_S = 30 * 24 * 3600  # unless a file says otherwise


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    id: str
    owner: str  # the name of a key; "" where there are none
    created_at: int


class FileRecord(_Record):
    """A file that is whole; times are Unix seconds."""

    filename: str
    nbytes: int
    purpose: Literal["batch", "batch_output"]
    expires_at: int


class LineProblem(BaseModel):
    """Why a batch failed, or a line of it."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchRecord(_Record):
    """A batch and where it is; what it answers is in the files that `output_id` and `error_id` name."""

    endpoint: str
    input_file_id: str
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    output_life_s: int = FILE_LIFE_S
    expires_at: int
    times: dict[Status, int] = {}  # when each status was reached
    output_id: str
    error_id: str
    has_output: bool = False
    has_errors: bool = False
    total: int = 0
    completed: int = 0
    failed: int = 0
    problems: list[LineProblem] = []

    @property
    def is_final(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in FINAL

    def reach(self, status: Status) -> None:
        """It is there now."""
        self.status = status
        self.times[status] = now()


def new_id(prefix: str) -> str:
    """Of 96 random bits."""
    return prefix + secrets.token_hex(12)


def now() -> int:
    """Unix seconds."""
    return int(time.time())


def new_file(owner: str, filename: str, nbytes: int, life_s: int | None, **fields: Any) -> FileRecord:
    """A record of a file that is made now."""
    created_at = now()
    return FileRecord(
        id=fields.pop("id", None) or new_id("file-"),
        owner=owner,
        created_at=created_at,
        filename=filename,
        nbytes=nbytes,
        purpose=fields.pop("purpose", "batch"),
        expires_at=created_at + (FILE_LIFE_S if life_s is None else life_s),
    )


def new_batch(
    owner: str, endpoint: str, input_file_id: str, metadata: dict[str, str] | None, output_life_s: int | None
) -> BatchRecord:
    """A record of a batch that begins now."""
    created_at = now()
    return BatchRecord(
        id=new_id("batch_"),
        owner=owner,
        created_at=created_at,
        endpoint=endpoint,
        input_file_id=input_file_id,
        metadata=metadata,
        output_life_s=FILE_LIFE_S if output_life_s is None else output_life_s,
        expires_at=created_at + COMPLETION_WINDOW_S,
        output_id=new_id("file-"),
        error_id=new_id("file-"),
    )
