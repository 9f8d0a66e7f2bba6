"""`TokenCounts`: which tokens have occurred, and how often, as arrays that grow by what is new."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY = 64


class TokenCounts:
    """Distinct token ids in order of first occurrence; adding one takes constant time on average."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        ids, counts = np.unique(np.asarray(token_ids, dtype=np.int64), return_counts=True)
        self._num_ids = len(ids)
        self._ids = np.empty(max(2 * len(ids), _FIRST_CAPACITY), dtype=np.int64)
        self._counts = np.empty(len(self._ids), dtype=np.float32)
        self._ids[: len(ids)] = ids
        self._counts[: len(ids)] = counts
        self._index = {token_id: index for index, token_id in enumerate(ids.tolist())}

    def add(self, token_id: int) -> None:
        """Count one more occurrence; views taken before are of the past."""
        index = self._index.setdefault(token_id, self._num_ids)
        if index < self._num_ids:
            self._counts[index] += 1
            return
        if index == len(self._ids):
            self._ids = np.resize(self._ids, 2 * index)
            self._counts = np.resize(self._counts, 2 * index)
        self._ids[index] = token_id
        self._counts[index] = 1
        self._num_ids += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """A view, good until the next `add`."""
        return self._ids[: self._num_ids]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """Beside `ids`; a view, good until the next `add`."""
        return self._counts[: self._num_ids]
