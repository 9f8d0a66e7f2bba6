"""`GenerationHistory`: what an earlier process knew of a name's generations, for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraserve.adapters.manifest import AdapterManifest


@dataclass(frozen=True)
class Published:
    """One that was published: its number, the hash of its content, its source, and when, in Unix seconds."""

    number: int
    hash: str
    source: str
    since: float


@dataclass(frozen=True)
class KeptGeneration:
    """One that can be loaded again: where it lies, and what goes over its own manifest."""

    number: int
    path: str
    manifest: AdapterManifest | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationHistory:
    """Of one name.

    Args:
        last: the highest number that was given.
        published: what is remembered, oldest first.
        kept: to be registered again where they have the hash that they had.
        shares: of requests, by number, which sum to 1; empty where all got the current one.
        shadow: (number, fraction) of the one that requests were copied to.
    """

    last: int
    published: tuple[Published, ...] = ()
    kept: tuple[KeptGeneration, ...] = ()
    shares: Mapping[int, float] = field(default_factory=dict)
    shadow: tuple[int, float] | None = None

    def number_of(self, content_hash: str) -> int | None:
        """Of the newest generation with this content; None where none is remembered."""
        found = (one.number for one in reversed(self.published) if one.hash == content_hash)
        return next(found, None)

    def hash_of(self, number: int) -> str | None:
        """Of a generation's content; None where it is not remembered."""
        return next((one.hash for one in self.published if one.number == number), None)
