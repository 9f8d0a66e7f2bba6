"""Text from outside made fit to be shown: on one line, with nothing a terminal obeys, of bounded length."""

from __future__ import annotations


def printable(text: str, max_chars: int) -> str:
    r"""`text` with everything unprintable as an escape, `…` in place of what is over `max_chars`.

    Escaped are line ends, control characters (ANSI codes begin with one), characters that turn the writing
    direction or have no width, and lone surrogates: all that `str.isprintable` says no to. What is
    printable already comes back as it is.
    """
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
