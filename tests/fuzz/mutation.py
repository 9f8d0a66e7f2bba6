"""Mutations of bytes and of JSON values, drawn from a `Random`: what a case is, its seed says."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any, TypeAlias

# A list's index or an object's key on the way to a value.
Path: TypeAlias = tuple[Any, ...]

INTEGERS = (0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
SCRAPS = (
    b"",
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1b[2K",
    b"{",
    b'"',
    b"]",
    b"1e999",
    b"\xe2\x80\xa8",
)
TEXTS = (
    "", " ", "\n", "a\nb", "\x00", "\x1b[2K", "\ud800", "\u202e", "é", "𝄞", "..", "/", "../x", "-1", "1e999",
    "null", "{{", "{% for", "[", "(", "(?P<x>", "\\", "None", "x" * 300, "ab " * 5000,
)  # fmt: skip
NUMBERS = (
    *INTEGERS, *(-one for one in INTEGERS), 10**20, 10**400, -(10**400), 0.5, -0.0, 1e-320, 1e38, 1e39, 1e308,
    -1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
NESTED: Any = json.loads("[" * 200 + "]" * 200)
OTHERS: tuple[Any, ...] = (
    None, True, False, [], {}, [None], [[]], [{}], {"": None}, {"a": {"a": {}}}, [0] * 3000, NESTED,
    ["a", 1, None], {"content": "x"}, {"content": 1}, {"name": "x", "template": "y"}, {"type": "x"},
)  # fmt: skip


def mutate_bytes(random: Random, data: bytes, num_interesting: int | None = None) -> bytes:
    """`data` after one to four changes, most of them among its first `num_interesting` bytes."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        limit = num_interesting if num_interesting is not None and random.random() < 0.9 else len(changed)
        at = random.randrange(min(limit, len(changed))) if changed and limit else 0
        kind = random.randrange(7)
        if kind == 0 and changed:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1 and changed:
            changed[at] = random.randrange(256)
        elif kind == 2:
            nbytes = random.choice((1, 4, 8))
            value = random.choice(INTEGERS) % 2 ** (8 * nbytes)
            changed[at : at + nbytes] = value.to_bytes(nbytes, "little")
        elif kind == 3:
            del changed[at:]
        elif kind == 4:
            del changed[at : at + random.choice((1, 2, 8, 64))]
        elif kind == 5:
            changed[at:at] = random.choice(SCRAPS) or random.randbytes(random.randrange(16))
        else:
            start = random.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + random.choice((1, 8, 64, 512))]
    return bytes(changed)


def mutate_json(random: Random, value: Any) -> Any:
    """A copy of `value` after one to three changes: of types, extremes, names, places."""
    changed = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        changed = _changed(random, changed)
    return changed


def odd_value(random: Random) -> Any:
    """A value that a reader may not expect."""
    kind = random.randrange(3)
    return copy.deepcopy(random.choice((TEXTS, NUMBERS, OTHERS)[kind]))


def to_json(value: Any) -> bytes:
    """JSON as Python writes it: NaN and infinities, and escapes for what is no text."""
    return json.dumps(value).encode()


def _changed(random: Random, value: Any) -> Any:
    path = random.choice(list(_paths(value)))
    if not path:
        return odd_value(random) if random.random() < 0.2 else value
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    key = path[-1]
    kind = random.randrange(8)
    if kind <= 3:
        parent[key] = odd_value(random)
    elif kind == 4:
        parent[key] = _nudged(random, parent[key])
    elif kind == 5:
        del parent[key]
    elif kind == 6:
        other: Any = value
        for step in random.choice(list(_paths(value))):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif isinstance(parent, dict):
        parent[random.choice((*TEXTS, f"{key}x", *parent))] = parent[key]
    else:
        parent.insert(random.randrange(len(parent) + 1), parent[key])
    return value


def _paths(value: Any, path: Path = (), depth: int = 0) -> Iterator[Path]:
    """To `value` and to all in it; of a long list, to some."""
    yield path
    if depth > 12:
        return
    if isinstance(value, dict):
        for key, one in list(value.items())[:200]:
            yield from _paths(one, (*path, key), depth + 1)
    elif isinstance(value, list):
        for index in range(0, len(value), max(1, len(value) // 20)):
            yield from _paths(value[index], (*path, index), depth + 1)


def _nudged(random: Random, value: Any) -> Any:
    """Near to `value`, or of it."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return random.choice((value + 1, value - 1, -value, value * 2, value // 2, str(value), [value]))
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        return value[:at] + random.choice(TEXTS) + value[at + random.randrange(2) :]
    if isinstance(value, list):
        return random.choice(
            (value * 2, value[::-1], value[1:], {str(i): one for i, one in enumerate(value)})
        )
    return random.choice((list(value), list(value.values()), str(value)))
