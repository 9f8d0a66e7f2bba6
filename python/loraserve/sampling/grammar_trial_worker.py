"""What a process does that compiles grammars for trial."""

from __future__ import annotations

from functools import cache

import llguidance

from loraserve.confined.worker import serve


def main() -> None:
    """Compiles what `check_cost` asks for."""
    serve(_answer)


def _answer(source: str) -> str:
    matcher = llguidance.LLMatcher(_bytes(), source, log_level=0)
    return str(matcher.get_error() or "")


@cache
def _bytes() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")
