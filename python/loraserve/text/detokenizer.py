"""Token ids to text as they arrive: whole characters only, and nothing past a stop string."""

from collections.abc import Sequence

from loraserve.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
# Tokens that are decoded again before new ones: as many as may hold the bytes of an unfinished character, and
# one more, which takes what a decoder does to the first token of a text.
NUM_CONTEXT = 4
MAX_WHOLE = 64  # tokens kept, of which the last NUM_CONTEXT are needed


class IncrementalDetokenizer:
    """Text of one answer, in pieces: joined, what decoding prompt and answer adds to the prompt's text.

        window:  [ end of the prompt, then of the answer, whose text is out | tokens pending ]

    Decoding begins a few tokens back, never at the beginning, so the cost is linear. Text is held back as
    long as a coming token may change it: an unfinished character of a byte-level vocabulary, and a run of
    byte tokens of a byte-fallback one, which is decoded as a whole where it ends. Tokens that are whole
    characters by themselves only gather behind the window, until one comes that is decoded.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._whole_texts = tokenizer.whole_texts
        self._window = _context(tokenizer, prompt_token_ids)
        self._shown = tokenizer.decode(self._window)  # what of the window's text is out
        self._is_whole = not self._shown.endswith(REPLACEMENT)  # all of it is out, and may be added to
        self._whole: list[int] = []  # tokens behind the window, whose texts are out

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that is complete with these tokens and was not before."""
        return "".join([self.push_one(token) for token in token_ids])

    def push_one(self, token: int) -> str:
        """As `push`, of one token."""
        if self._is_whole:
            text = self._whole_texts[token]
            if text is not None:
                self._whole.append(token)
                if len(self._whole) >= MAX_WHOLE:
                    self._take_whole()
                return text
        return self._decode_one(token) if self._tokenizer.is_text(token) else ""

    def end_run(self) -> str:
        """What is left if a token that is no text comes next, as `flush` gives it; text may follow."""
        text = self.flush()
        self._shown = self._tokenizer.decode(self._window)
        self._is_whole = True
        return text

    def flush(self) -> str:
        """What is left if no more tokens come: an unfinished character, as U+FFFD."""
        self._take_whole()
        return self._added(self._tokenizer.decode(self._window))

    def _take_whole(self) -> None:
        """Into the window go the last of the tokens behind it; enough of them are context alone."""
        taken = self._whole[-NUM_CONTEXT:]
        if len(taken) == NUM_CONTEXT:
            self._window, self._shown = [], ""
        self._window += taken
        self._shown += "".join([self._whole_texts[token] or "" for token in taken])
        self._whole = []

    def _decode_one(self, token: int) -> str:
        self._take_whole()
        self._window.append(token)
        if token in self._tokenizer.byte_ids:
            self._is_whole = False
            return ""
        decoded = self._tokenizer.decode(self._window)
        text = decoded.removesuffix(REPLACEMENT)
        self._is_whole = text == decoded
        added = ""
        if not self._shown.startswith(text):  # it does while the prompt's own end is unfinished
            added, self._shown = self._added(text), text
        if self._shown == text and len(self._window) >= 2 * NUM_CONTEXT:
            self._shorten()
        return added

    def _added(self, text: str) -> str:
        """What `text` has beyond what is out, or if a prompt's unfinished end changed, from there on."""
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        pairs = zip(self._shown, text, strict=False)
        return text[next(at for at, (old, new) in enumerate([*pairs, ("", None)]) if old != new) :]

    def _shorten(self) -> None:
        kept = self._window[-NUM_CONTEXT:]
        text = self._tokenizer.decode(kept)
        if text:  # else what a decoder strips from the beginning of a text would be taken from the next token
            self._window, self._shown = kept, text.removesuffix(REPLACEMENT)


class StopStrings:
    """Passes text through up to the first stop string to be completed, which is cut off.

    Text that may be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched: str | None = None  # the stop string that is complete

    @property
    def is_matched(self) -> bool:
        """Whether a stop string is complete: no more text is shown."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Text now safe to show; sets `matched` when a stop string is complete."""
        if self.is_matched:
            return ""
        if not self.stops:
            return text
        buffer = self._held + text
        found = self._first_stop(buffer)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return buffer[:start]
        safe = len(buffer) - self._num_undecided(buffer)
        self._held = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, buffer: str) -> tuple[int, str] | None:
        """Where the match that ends first begins, and what it is; of those ending together, the longest."""
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := buffer.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _num_undecided(self, buffer: str) -> int:
        """Length of the longest end of the buffer that begins a stop string."""
        longest = min(len(buffer), max((len(stop) for stop in self.stops), default=1) - 1)
        for length in range(longest, 0, -1):
            end = buffer[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0


def _context(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> list[int]:
    """The end of a prompt that its answer is decoded with: a run of byte tokens is whole in it."""
    context: list[int] = []
    num_others = 0
    for token in reversed(prompt_token_ids):
        if tokenizer.is_text(token):
            context.append(token)
            num_others += token not in tokenizer.byte_ids
            if num_others >= NUM_CONTEXT and tokenizer.decode(context[-NUM_CONTEXT:]):
                break
    return context[::-1]
