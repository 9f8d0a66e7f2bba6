"""What ingress and replicas tell one another; all of it can be pickled, and stays within the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from loraserve.engine.name_history import NameHistory
from loraserve.engine.stats import AdapterInfo, EngineInfo, EngineStats
from loraserve.engine.versions import GenerationInfo
from loraserve.request import Delta
from loraserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from loraserve._core import Receipt
    from loraserve.adapters.manifest import AdapterManifest
    from loraserve.adapters.startup import AdapterFailure
    from loraserve.pooling.head import ClassificationHead

Ranking: TypeAlias = tuple[str, ...]
"""Ids of replicas that a call is for, the best first."""


@dataclass(frozen=True, kw_only=True)
class PlainReceipt:
    """A `Receipt` in Python's own types, without the head, which is told apart from it."""

    directory: str
    tensors: int
    modules: list[str]
    layers: list[int]
    rank: int
    ranks: list[int]
    nbytes: int
    hash: str
    base_check: str
    base_model: str | None
    base_copies: list[str]
    is_compared: bool
    changes_tables: bool
    added_tokens: list[int]
    added_head_tokens: list[int]
    invocation_tokens: list[int]
    task_type: str | None
    notes: list[str]
    not_used: list[str]

    @classmethod
    def of(cls, receipt: Receipt) -> PlainReceipt:
        """The same values."""
        return cls(**{name: getattr(receipt, name) for name in cls.__dataclass_fields__})


def plain_info(info: AdapterInfo) -> AdapterInfo:
    """With a receipt that can be pickled."""
    receipt: Any = PlainReceipt.of(info.receipt)
    return replace(info, receipt=receipt)


@dataclass(frozen=True, kw_only=True)
class PreparedReply:
    """What a request means to the replica that keeps it under its ticket.

    `registered` says of each name whether there is such an adapter; `tokenizer_of` is the adapter whose
    tokens it has, None for the model's.
    """

    replica: str
    prompt_token_ids: list[int]
    params: SamplingParams
    registered: Mapping[str, bool]
    generations: Mapping[str, int]
    num_sequences: int
    tokenizer_of: str | None


@dataclass(frozen=True)
class Accepted:
    """A request is queued; first of its events. `prompt_token_ids` is None where they are as prepared."""

    generations: Mapping[str, int]
    prompt_token_ids: list[int] | None


class NotPreparedError(Exception):
    """A replica does not know a ticket: it is another one, or has forgotten it."""


Event: TypeAlias = Accepted | Delta | Sequence[Delta] | Exception
LinkedEvents: TypeAlias = Sequence[tuple[str, Event]]
"""(ticket, event) in order, of all requests of a link."""


@dataclass(frozen=True)
class Publication:
    """One generation of a name that is kept, and how it is loaded again."""

    number: int
    path: str
    manifest: AdapterManifest | None


@dataclass(frozen=True)
class AdapterRecord:
    """One name as every replica has it."""

    publications: tuple[Publication, ...]
    history: NameHistory
    is_pinned: bool

    def is_same(self, other: AdapterRecord | None) -> bool:
        """Whether requests mean the same by both; when they were published does not matter."""
        return other is not None and self._meaning() == other._meaning()

    def _meaning(self) -> tuple[object, ...]:
        hashes = {one.number: one.hash for one in self.history.history}
        kept = [(number, hashes.get(number)) for number in self.history.kept]
        history = self.history
        return kept, history.last, history.current, dict(history.shares), history.shadow, self.is_pinned


@dataclass(frozen=True)
class FleetState:
    """All adapters that are served, in order, and the last numbers of names that are gone."""

    adapters: Mapping[str, AdapterRecord] = field(default_factory=dict)
    gone: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How a replica is at this moment; `stats` has no adapters, `resident` are those in its memory."""

    replica: str
    info: EngineInfo
    stats: EngineStats
    resident: frozenset[str]
    refusal: str | None
    stuck: str | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One adapter of a replica; `head` is its own, and `has_own_tokens` where the model's are not all."""

    info: AdapterInfo
    generations: Sequence[GenerationInfo]
    record: AdapterRecord | None
    head: ClassificationHead | None
    has_own_tokens: bool


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What a replica has, of the names that were asked for, or all."""

    entries: Mapping[str, Entry]
    gone: Mapping[str, int]
    failures: Sequence[AdapterFailure]
    model_head: ClassificationHead | None
