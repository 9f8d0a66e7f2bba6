"""Messages as Anthropic words them, whole and as a stream of events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import orjson
from pydantic_core import from_json

from loraserve.request import Delta, Usage
from loraserve.server.http.answer_parts import AnswerPart, AnswerParts, PartPiece
from loraserve.server.request_run import RequestRun
from loraserve.tools.call import INVALID_JSON

ThinkingDisplay: TypeAlias = Literal["shown", "omitted", "absent"]


@dataclass(frozen=True, kw_only=True)
class MessageHead:
    """What the client asked for, as far as the answer tells it.

    `thinking` is whether reasoning is a block, a block without its text, or left out.
    """

    id: str
    model: str
    max_tokens: int
    stop_sequences: frozenset[str]
    thinking: ThinkingDisplay

    def new_answer(self) -> AnswerParts:
        """What deltas are appended to."""
        return AnswerParts(wants_reasoning=self.thinking != "absent")

    def message(self, content: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """A message that has not ended."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def ending(self, answer: AnswerParts) -> dict[str, Any]:
        """Why it ended; a stop string that the client did not give is an end like others."""
        stop_string = answer.stop_string if answer.stop_string in self.stop_sequences else None
        reason = "end_turn" if stop_string is None else "stop_sequence"
        if answer.finish_reason == "tool_calls":
            reason, stop_string = "tool_use", None
        elif answer.finish_reason == "length":
            is_whole = answer.usage is None or answer.usage.completion_tokens >= self.max_tokens
            reason = "max_tokens" if is_whole else "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": stop_string}

    def block(self, part: AnswerPart, *, is_cut: bool) -> dict[str, Any]:
        """A whole part; `is_cut` is whether the answer's end may have cut its last call."""
        if part.kind == "text":
            return {"type": "text", "text": part.text}
        if part.kind == "reasoning":
            thinking = part.text if self.thinking == "shown" else ""
            return {"type": "thinking", "thinking": thinking, "signature": self.id}
        tool_input = call_input(part.text, is_cut=is_cut)
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": tool_input}


class WholeMessage:
    """A `message`."""

    def __init__(self, head: MessageHead) -> None:
        self._head = head

    def body(self, run: RequestRun, answers: Sequence[Sequence[AnswerParts]]) -> dict[str, Any]:
        """The one answer to the one prompt."""
        head, answer = self._head, answers[0][0]
        is_cut = answer.finish_reason == "length" or answer.stop_string is not None
        content = [head.block(part, is_cut=is_cut) for part in answer.parts]
        return head.message(content, usage_body(run.usage)) | head.ending(answer)


class MessageEvents:
    """`message_start`, each block's start, deltas and stop, `message_delta`, `message_stop`."""

    def __init__(self, head: MessageHead) -> None:
        self._head = head
        self._answer = head.new_answer()

    def first(self, run: RequestRun) -> bytes:
        usage = usage_body(Usage(run.num_prompt_tokens, 0, 0))
        return _event("message_start", message=self._head.message([], usage)) + _event("ping")

    def delta(self, prompt: int, delta: Delta) -> bytes:
        return b"".join(map(self._piece, self._answer.append(delta)))

    def last(self, run: RequestRun) -> bytes:
        ending = self._head.ending(self._answer)
        usage = usage_body(run.usage)
        return (
            self._stop(self._num_blocks)
            + _event("message_delta", delta=ending, usage=usage)
            + _event("message_stop")
        )

    def error(self, body: Mapping[str, Any]) -> bytes:
        return b"event: error\ndata: " + orjson.dumps(body) + b"\n\n"

    @property
    def _num_blocks(self) -> int:
        return len(self._answer.parts)

    def _piece(self, piece: PartPiece) -> bytes:
        index, part, text, begins, _ = piece
        events = self._stop(index) + self._start(index, part) if begins else b""
        if part.kind == "text":
            delta = {"type": "text_delta", "text": text}
        elif part.kind == "call":
            delta = {"type": "input_json_delta", "partial_json": text}
        elif self._head.thinking == "shown":
            delta = {"type": "thinking_delta", "thinking": text}
        else:
            return events
        return events + _event("content_block_delta", index=index, delta=delta)

    def _start(self, index: int, part: AnswerPart) -> bytes:
        block: dict[str, Any] = {"type": "text", "text": ""}
        if part.kind == "call":
            block = {"type": "tool_use", "id": part.call_id, "name": part.name, "input": {}}
        elif part.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        return _event("content_block_start", index=index, content_block=block)

    def _stop(self, num_begun: int) -> bytes:
        """Ends the last of the blocks begun so far, if any."""
        if num_begun == 0:
            return b""
        index, signed = num_begun - 1, b""
        if self._answer.parts[index].kind == "reasoning":
            delta = {"type": "signature_delta", "signature": self._head.id}
            signed = _event("content_block_delta", index=index, delta=delta)
        return signed + _event("content_block_stop", index=index)


def call_input(arguments: str, *, is_cut: bool) -> dict[str, Any]:
    """Arguments as an object: as far as they go where the answer was cut, wrapped where they are none."""
    try:
        value = from_json(arguments or "{}", allow_partial=is_cut)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {INVALID_JSON: arguments}


def usage_body(usage: Usage | None) -> dict[str, Any]:
    """Anthropic's shape of token counts: those from the prefix cache are none of the input's."""
    usage = usage or Usage(0, 0, 0)
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "service_tier": "standard",
    }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))
