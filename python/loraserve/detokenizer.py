"""Token ids to text as they arrive: whole characters only, and nothing past a stop string."""

from collections.abc import Sequence

from loraserve.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# A character is at most 4 bytes: at most 4 tokens hold it, and at most 3 bytes of one are pending.
MAX_CHAR_TOKENS = 4
MAX_PENDING_CHARS = 3
# Tokens kept to read on from while bytes that are not UTF-8 keep coming.
GARBAGE_WINDOW = 8


class IncrementalDetokenizer:
    """Text of one sequence, in pieces: joined, the pieces equal decoding all ids at once.

        window:  [ tokens whose text is out | tokens pending ]
                                            ^ _num_read

    Decoding goes on from the last point where a character ended, never from the beginning, so the
    cost is linear. Byte-level vocabularies are exact for any ids; a byte-fallback decoder judges a
    run of bytes as a whole, so bytes that never form UTF-8 may show as fewer replacement characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_read = 0
        self._num_emitted = 0  # characters of the window's text

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is complete with these tokens and was not before."""
        special = self._tokenizer.special_ids
        return "".join(self._push_one(token) for token in token_ids if token not in special)

    def flush(self) -> str:
        """What is left when no more tokens come: an unfinished character, as U+FFFD."""
        return self._tokenizer.decode(self._window)[self._num_emitted :]

    def _push_one(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):
            pending = len(self._window) - self._num_read
            return "" if pending <= MAX_CHAR_TOKENS else self._pass_garbage(text)
        delta = text[self._num_emitted :]
        self._forget(self._num_read)
        self._num_read = len(self._window)
        return delta

    def _pass_garbage(self, text: str) -> str:
        """Too many tokens for one character: let go what can't change any more."""
        text = _decided(text)
        delta = text[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(text))
        if len(self._window) >= 2 * GARBAGE_WINDOW:
            self._forget(len(self._window) - GARBAGE_WINDOW)
            self._num_read = 0
        return delta

    def _forget(self, num_tokens: int) -> None:
        del self._window[:num_tokens]
        self._num_emitted = len(_decided(self._tokenizer.decode(self._window)))


class StopStrings:
    """Passes text through up to the first stop string to be completed, which is cut off.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.is_matched = False

    def push(self, text: str) -> str:
        """Text now safe to show; sets `is_matched` when a stop string is complete."""
        if self.is_matched:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        start = self._first_stop(buffer)
        if start is not None:
            self.is_matched, self._held = True, ""
            return buffer[:start]
        safe = len(buffer) - self._num_undecided(buffer)
        self._held = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, buffer: str) -> int | None:
        """Where the match that ends first begins; of those ending together, the longest."""
        found = [(at + len(stop), at) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_undecided(self, buffer: str) -> int:
        """Length of the longest end of the buffer that begins a stop string."""
        longest = min(len(buffer), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            end = buffer[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


def _decided(text: str) -> str:
    """Text without the replacement characters at its end that may still turn into one character."""
    kept = text.rstrip(REPLACEMENT)
    return text[: max(len(kept), len(text) - MAX_PENDING_CHARS)]
