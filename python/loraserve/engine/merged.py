"""`Merged`: the one adapter that is in the model's weights, by name and as the engine tells of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from loraserve import _core
from loraserve.adapters.check import CheckedFiles
from loraserve.adapters.registry import RegisteredAdapter
from loraserve.engine.stats import AdapterInfo, AdapterUsage
from loraserve.errors import AdapterUnavailableError, InvalidRequestError

NO_ID = -1  # the scheduler knows none of it


class Merged:
    """A request gets it by its name or without one, at weight 1; it can't go, nor another come.

    Args:
        name: what requests call it.
        files: as checked against the model that is served.
        in_weights: as checked when it was folded in.
        turn: as of any load.

    Raises:
        AdapterUnavailableError: the files have changed in between.
    """

    def __init__(self, name: str, files: CheckedFiles, in_weights: CheckedFiles, turn: int) -> None:
        if in_weights.receipt.hash != files.receipt.hash:
            raise AdapterUnavailableError(f"adapter {name!r} has changed while it was merged, start again")
        self.name = name
        notes = ["merged into the model's weights (--merge)"]
        self.receipt = files.receipt.with_beside(notes, files.receipt.not_used)
        self.adapter = RegisteredAdapter(
            name,
            files.path,
            self.receipt,
            NO_ID,
            files.manifest,
            files.text,
            turn,
            files.stored,
            files.head,
        )

    def check_combination(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Raises InvalidRequestError: it is summed with others, or has another weight than 1."""
        if not any(name == self.name for name, _ in adapters) or list(adapters) == [(self.name, 1.0)]:
            return
        given = ", ".join(f"{name!r} of weight {weight:g}" for name, weight in adapters)
        raise InvalidRequestError(
            f"adapter {self.name!r} is in the model's weights (--merge), alone and with weight 1: "
            f"{given} can't be had"
        )

    def refuse(self, what: str) -> None:
        """Raises InvalidRequestError: `what` would change which adapters there are."""
        raise InvalidRequestError(
            f"{what}: {self.name!r} is in the model's weights (--merge), beside it there is none and it "
            "can't be taken out; start without --merge"
        )

    def info(self, load: _core.SchedulerStats, usage: AdapterUsage) -> AdapterInfo:
        """All that runs, runs on it; nothing of it is in the pool."""
        return AdapterInfo(
            name=self.name,
            path=self.adapter.path,
            description=self.adapter.manifest.description,
            receipt=self.receipt,
            state="resident",
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            is_pinned=True,
            nbytes=0,
            num_loads=0,
            num_load_failures=0,
            num_evictions=0,
            num_uninvoked=0,
            load_s=0.0,
            last_load_s=None,
            usage=copy.copy(usage),
        )
