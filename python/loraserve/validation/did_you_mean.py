"""Names that someone wrote and nobody knows: which known one was likely meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

MAX_COMPARED_CHARS = 64  # likeness costs time with the square of the length
CUTOFF = 0.7


def did_you_mean(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """`, did you mean X?` for the known name most like `name`, in whatever case it is written; else "".

    Args:
        known: names that may stand where `name` does.
        elsewhere: names that have another name or place here → what to write instead.
    """
    written = _snake_case(name[:MAX_COMPARED_CHARS])
    meant = {other: other for other in known} | dict(elsewhere or {})
    likely = [written] if written in meant else difflib.get_close_matches(written, meant, 1, CUTOFF)
    return f", did you mean {meant[likely[0]]}?" if likely else ""


def _snake_case(name: str) -> str:
    """`maxTokens` and `max-tokens` as `max_tokens`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
