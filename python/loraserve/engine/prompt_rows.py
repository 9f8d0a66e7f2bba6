"""`RowReaders`: who is given hidden states of prompts, as the steps that compute them end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from loraserve.backends.base import StepRows
from loraserve.pooling.params import PromptRows


class RowReader(Protocol):
    """Of one prompt; rows come in order, each once, and the last before anything that follows the prompt."""

    rows: PromptRows
    ends_with_prompt: bool  # nothing is generated
    is_finite: bool

    def add(self, position: int, hidden: torch.Tensor, logits: Callable[[int, int], torch.Tensor]) -> None:
        """Take the rows from `position` of the prompt on.

        Args:
            hidden: float32 [rows, hidden] on the CPU.
            logits: (first, count) → logits of these of the rows, float32 [count, columns], for now.
        """
        ...


class RowReaders:
    """Readers by request; they are added and removed under the engine's lock, and read on its thread."""

    def __init__(self) -> None:
        self._readers: dict[int, RowReader] = {}

    def add(self, request_id: int, reader: RowReader) -> None:
        """Have what comes of the request read."""
        self._readers[request_id] = reader

    def read(self, spans: Sequence[tuple[int, int, int]], rows: StepRows) -> None:
        """Hand out a step's rows.

        Args:
            spans: (request, position of the first row in its prompt, number of rows), in the order of `rows`.
            rows: the step's.
        """
        hidden = rows.hidden.to("cpu", torch.float32)
        first = 0
        for request_id, position, num_rows in spans:
            reader = self._readers.get(request_id)
            if reader is not None:  # it may have ended since the step was planned

                def logits(start: int, count: int, offset: int = first) -> torch.Tensor:
                    return rows.logits_of(offset + start, count)

                reader.add(position, hidden[first : first + num_rows], logits)
            first += num_rows

    def not_finite(self, request_ids: Sequence[int]) -> list[int]:
        """Those of the requests that were given rows which are no numbers."""
        readers = self._readers
        return [id_ for id_ in request_ids if id_ in readers and not readers[id_].is_finite]

    def remove(self, request_id: int) -> None:
        """Forget a request that has ended; one without a reader is left alone."""
        self._readers.pop(request_id, None)
