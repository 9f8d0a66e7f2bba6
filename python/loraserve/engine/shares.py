"""Shares of requests in whole parts, and where a user falls among them."""

from __future__ import annotations

import hashlib
from numbers import Real
from typing import Final

from loraserve.errors import InvalidRequestError

PARTS: Final = 10_000  # shares are in hundredths of a percent


def check_beside(share: float | None, shadow: float | None) -> None:
    """Whether a generation can be published beside the current one so.

    Raises InvalidRequestError: one is out of range, or both are given.
    """
    if share is not None and shadow is not None:
        raise InvalidRequestError("share and shadow are both given, a shadow answers no requests: give one")
    if share is not None:
        parts_of(share)
    if shadow is not None:
        shadow_parts(shadow)


def shadow_parts(fraction: float) -> int:
    """Of requests that are copied. Raises InvalidRequestError: it is out of range."""
    parts = parts_of(fraction, "the fraction of a shadow")
    if parts == 0:
        raise InvalidRequestError(f"the fraction of a shadow is {fraction!r}, give at least {1 / PARTS:g}")
    return parts


def parts_of(share: float, name: str = "share") -> int:
    """A share in `PARTS`. Raises InvalidRequestError: it is out of range; `name` is what it is called."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 <= float(share) <= 1.0:
        raise InvalidRequestError(f"{name} is {share!r}, it must be from 0 to 1")
    return round(float(share) * PARTS)


def place_of(name: str, user: str) -> int:
    """From 0 below `PARTS`, even over users; of another name another one."""
    digest = hashlib.blake2b(f"{name}\0{user}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % PARTS
