"""Responses as OpenAI words them, whole and as a stream of events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from loraserve.request import Delta, Usage
from loraserve.server.http.answer_parts import AnswerPart, AnswerParts, PartKind, PartPiece
from loraserve.server.http.openai.logprobs import chat_logprobs
from loraserve.server.http.responses.items import new_id, packed_reasoning
from loraserve.server.http.token_texts import TokenTexts
from loraserve.server.request_run import RequestRun
from loraserve.text.tokenizer import Tokenizer

ITEM_TYPES: dict[PartKind, str] = {"reasoning": "reasoning", "text": "message", "call": "function_call"}


@dataclass(frozen=True, kw_only=True)
class ResponseHead:
    """What every response object repeats.

    Args:
        id: of the response.
        echoed: fields of the request that it shows.
        wants_logprobs: whether texts come with their tokens' log-probabilities.
        wants_packed: whether reasoning comes as `encrypted_content`, too.
        texts_of: texts of single tokens.
        keep: given the response that has ended and the items of its output, before the client has it.
    """

    id: str
    echoed: Mapping[str, Any]
    wants_logprobs: bool
    wants_packed: bool
    texts_of: Callable[[Tokenizer], TokenTexts]
    keep: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], None]
    created_at: int = field(default_factory=lambda: int(time.time()))

    def response(
        self, status: str, output: Sequence[Mapping[str, Any]] = (), **fields: Any
    ) -> dict[str, Any]:
        """A response object; `fields` replace those of one that has only begun."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": list(output),
            "usage": None,
            **self.echoed,
            **fields,
        }


class OutputItems:
    """The items of one answer, as much as has come; a part of the answer is an item."""

    def __init__(self, head: ResponseHead) -> None:
        self.answer = AnswerParts()
        self._head = head
        self._ids: list[str] = []
        self._texts: TokenTexts | None = None

    def note_tokenizer(self, run: RequestRun) -> None:
        """What log-probabilities are told in."""
        if self._head.wants_logprobs:
            self._texts = self._head.texts_of(run.tokenizer)

    def id_of(self, place: int) -> str:
        """The id of item number `place`."""
        while len(self._ids) <= place:
            self._ids.append(new_id(ITEM_TYPES[self.answer.parts[len(self._ids)].kind]))
        return self._ids[place]

    def logprobs(self, piece: PartPiece | AnswerPart) -> list[dict[str, Any]]:
        """Of the tokens of a text, or of a piece of it."""
        if self._texts is None:
            return []
        content: list[dict[str, Any]] = chat_logprobs(piece.logprobs, self._texts)["content"]
        return content

    def begun(self, place: int) -> dict[str, Any]:
        """An item of which nothing has come."""
        part = self.answer.parts[place]
        return self._item(place, AnswerPart(part.kind, "", part.call_id, part.name), "in_progress")

    def content(self, place: int) -> dict[str, Any]:
        """The one part of an item's content; calls have none."""
        part = self.answer.parts[place]
        if part.kind == "reasoning":
            return {"type": "reasoning_text", "text": part.text}
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": self.logprobs(part)}

    def ended(self, place: int) -> dict[str, Any]:
        """An item that is whole, or as much as there is of the last one of an answer that was cut."""
        is_last = place == len(self.answer.parts) - 1
        is_cut = is_last and self.answer.finish_reason in (None, "length")
        return self._item(place, self.answer.parts[place], "incomplete" if is_cut else "completed")

    def all(self) -> list[dict[str, Any]]:
        """Of an answer that has ended."""
        return [self.ended(place) for place in range(len(self.answer.parts))]

    def _item(self, place: int, part: AnswerPart, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.id_of(place), "type": ITEM_TYPES[part.kind], "status": status}
        content = [] if status == "in_progress" or part.kind == "call" else [self.content(place)]
        if part.kind == "text":
            return {**item, "role": "assistant", "content": content}
        if part.kind == "call":
            return {**item, "call_id": part.call_id, "name": part.name, "arguments": part.text}
        packed = packed_reasoning(part.text) if self._head.wants_packed and content else None
        return {**item, "summary": [], "content": content, "encrypted_content": packed}

    def response(self, usage: Usage | None) -> dict[str, Any]:
        """The response that has ended; it is kept."""
        is_cut = self.answer.finish_reason == "length"
        output = self.all()
        response = self._head.response(
            "incomplete" if is_cut else "completed",
            output,
            usage=usage_body(usage),
            completed_at=None if is_cut else int(time.time()),
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
        )
        self._head.keep(response, output)
        return response


class WholeResponseObject:
    """A `response`."""

    def __init__(self, head: ResponseHead) -> None:
        self._items = OutputItems(head)

    def new_answer(self) -> AnswerParts:
        """What deltas are appended to; there is one answer."""
        return self._items.answer

    def body(self, run: RequestRun, answers: Sequence[Sequence[AnswerParts]]) -> dict[str, Any]:
        """The one answer to the one prompt."""
        self._items.note_tokenizer(run)
        return self._items.response(run.usage)


class ResponseEvents:
    """`response.created` and what follows; events are numbered, items and their content begin and end."""

    def __init__(self, head: ResponseHead) -> None:
        self._head = head
        self._items = OutputItems(head)
        self._num_events = 0

    def first(self, run: RequestRun) -> bytes:
        self._items.note_tokenizer(run)
        response = self._head.response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, prompt: int, delta: Delta) -> bytes:
        return b"".join(map(self._piece, self._items.answer.append(delta)))

    def last(self, run: RequestRun) -> bytes:
        ended = self._end(len(self._items.answer.parts) - 1)
        response = self._items.response(run.usage)
        return ended + self._event(f"response.{response['status']}", response=response)

    def error(self, body: Mapping[str, Any]) -> bytes:
        error = body["error"]
        told = {"code": error["code"] or error["type"], "message": error["message"]}
        response = self._head.response("failed", self._items.all(), error=told)
        return self._event("response.failed", response=response)

    def _piece(self, piece: PartPiece) -> bytes:
        place, part = piece.place, piece.part
        events = self._end(place - 1) + self._begin(place) if piece.begins else b""
        where = {"item_id": self._items.id_of(place), "output_index": place}
        if part.kind == "call":
            if not piece.text:
                return events
            return events + self._event("response.function_call_arguments.delta", **where, delta=piece.text)
        if part.kind == "reasoning":
            kind, more = "response.reasoning_text.delta", {}
        else:
            kind, more = "response.output_text.delta", {"logprobs": self._items.logprobs(piece)}
        return events + self._event(kind, **where, content_index=0, delta=piece.text, **more)

    def _begin(self, place: int) -> bytes:
        events = self._event("response.output_item.added", output_index=place, item=self._items.begun(place))
        part = self._items.answer.parts[place]
        if part.kind == "call":
            return events
        empty: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if part.kind == "text":
            empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        where = {"item_id": self._items.id_of(place), "output_index": place, "content_index": 0}
        return events + self._event("response.content_part.added", **where, part=empty)

    def _end(self, place: int) -> bytes:
        """Ends item number `place`, if there is one."""
        if place < 0:
            return b""
        items, part = self._items, self._items.answer.parts[place]
        where: dict[str, Any] = {"item_id": items.id_of(place), "output_index": place}
        if part.kind == "call":
            events = self._event(
                "response.function_call_arguments.done", **where, name=part.name, arguments=part.text
            )
        else:
            content = items.content(place)
            more = {"logprobs": content["logprobs"]} if part.kind == "text" else {}
            kind = "output_text" if part.kind == "text" else "reasoning_text"
            where["content_index"] = 0
            events = self._event(f"response.{kind}.done", **where, text=part.text, **more)
            events += self._event("response.content_part.done", **where, part=content)
        return events + self._event("response.output_item.done", output_index=place, item=items.ended(place))

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": self._num_events, **fields})
        self._num_events += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def usage_body(usage: Usage | None) -> dict[str, Any] | None:
    """The API's shape of token counts; None stays None."""
    if usage is None:
        return None
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
