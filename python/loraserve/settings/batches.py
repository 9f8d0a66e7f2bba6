"""Files and batches of requests, as settings."""

from __future__ import annotations

from pathlib import Path

from loraserve.config import MAX_COUNTS
from loraserve.settings.fields import Count, Memory, option
from loraserve.settings.replicas import ReplicaSettings


class BatchSettings(ReplicaSettings):
    """A part of `ServeSettings`."""

    batch_dir: Path | None = option(
        None,
        "batches",
        "keep files and batches (/v1/files, /v1/batches) here, and go on with them at the next start "
        "(default: there are none)",
        "DIRECTORY",
    )
    batch_dir_size: Memory = option(
        "16GiB", "batches", "most that all files there may take, a key's half of it", "SIZE"
    )
    batch_max_num_seqs: Count | None = option(
        None,
        "batches",
        "most lines of batches at once, a fourth of it beside other requests (default: an eighth of "
        "--max-num-seqs)",
        "N",
        most=MAX_COUNTS["max_num_seqs"],
    )
