"""Completions and chat completions as OpenAI words them, whole and as a stream of chunks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from loraserve.request import Completion, Delta, FinishReason, TokenLogprob, Usage
from loraserve.server.http.answer import DONE
from loraserve.server.http.openai.echo import (
    Prompt,
    PromptLogprobs,
    echo_logprobs,
    echoed_text,
    joined,
    prompt_logprobs_of,
    vllm_logprobs,
)
from loraserve.server.http.openai.logprobs import chat_logprobs, completion_logprobs
from loraserve.server.http.token_texts import TokenTexts
from loraserve.server.request_run import RequestRun
from loraserve.text.tokenizer import Tokenizer
from loraserve.tools.call import ToolCallDelta

SERVICE_TIER = "default"  # whichever was asked for, there is no other


@dataclass(frozen=True, kw_only=True)
class AnswerHead:
    """What every chunk and body repeats, and what the client asked to see; `created` is in Unix seconds.

    `wants_counts` is whether every chunk of a stream has the tokens so far,
    `is_legacy` whether a call is told as the older `function_call`.
    """

    id: str
    model: str
    fingerprint: str
    tells_service_tier: bool = False
    num_answers: int
    wants_logprobs: bool
    wants_usage: bool
    wants_counts: bool = False
    wants_prompt_logprobs: bool = False
    wants_reasoning: bool = True
    is_legacy: bool = False
    texts_of: Callable[[Tokenizer], TokenTexts]
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, kind: str) -> dict[str, Any]:
        """The head of a body whose `object` is `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            **({"service_tier": SERVICE_TIER} if self.tells_service_tier else {}),
        }


class WholeChat:
    """`chat.completion`."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        choices = [self._choice(index, answer, run) for index, answer in enumerate(answers[0])]
        body = {
            **self._head.fields("chat.completion"),
            "choices": choices,
            "usage": usage_body(run.usage),
        }
        of_prompt = prompt_logprobs_of(answers[0])
        if self._head.wants_prompt_logprobs and of_prompt is not None:
            body["prompt_logprobs"] = vllm_logprobs(of_prompt, self._head.texts_of(run.tokenizer))
        return body

    def _choice(self, index: int, answer: Completion, run: RequestRun) -> dict[str, Any]:
        logprobs = None
        if self._head.wants_logprobs:
            logprobs = chat_logprobs(answer.logprobs or [], self._head.texts_of(run.tokenizer))
        return {
            "index": index,
            "message": self._message(answer),
            "logprobs": logprobs,
            "finish_reason": finish_reason(answer.finish_reason, self._head),
        }

    def _message(self, answer: Completion) -> dict[str, Any]:
        content = None if answer.tool_calls and not answer.text else answer.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer.reasoning and self._head.wants_reasoning:
            message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
        calls = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in answer.tool_calls]
        if calls and self._head.is_legacy:
            message["function_call"] = calls[0][1]
        elif calls:
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": function} for call_id, function in calls
            ]
        return message


def finish_reason(reason: FinishReason | None, head: AnswerHead) -> str | None:
    """As OpenAI words it."""
    return "function_call" if reason == "tool_calls" and head.is_legacy else reason


class WholeCompletion:
    """`text_completion`; of the answers to a prompt, the likeliest `num_answers` are sent.

    `echoed` are the prompts that answers begin with, None where they don't.
    """

    def __init__(self, head: AnswerHead, echoed: Sequence[Prompt | None]) -> None:
        self._head = head
        self._echoed = echoed

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for place, of_prompt in enumerate(answers):
            of_prompt_logprobs = prompt_logprobs_of(of_prompt)
            for answer in likeliest(of_prompt, self._head.num_answers):
                choices.append({"index": len(choices)} | self._choice(place, answer, of_prompt_logprobs, run))
        return {
            **self._head.fields("text_completion"),
            "choices": choices,
            "usage": usage_body(run.usage),
        }

    def _choice(
        self, place: int, answer: Completion, of_prompt: PromptLogprobs | None, run: RequestRun
    ) -> dict[str, Any]:
        """Of an answer to prompt number `place`."""
        prompt, texts = self._echoed[place], self._head.texts_of(run.tokenizer)
        echo = echoed_text(prompt, run.tokenizer)
        logprobs = None
        if self._head.wants_logprobs:
            logprobs = completion_logprobs(answer.logprobs or [], texts, len(echo))
            if prompt is not None and of_prompt is not None:
                token_ids = run.streams[place].prompt_token_ids
                logprobs = joined(echo_logprobs(prompt, token_ids, of_prompt, texts), logprobs)
        choice: dict[str, Any] = {
            "text": echo + answer.text,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
        }
        if self._head.wants_prompt_logprobs and of_prompt is not None:
            choice["prompt_logprobs"] = vllm_logprobs(of_prompt, texts)
        return choice


class ChunkWriter:
    """What both streams share: chunks are put together from bytes, only texts are encoded."""

    kind = ""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        start = orjson.dumps(head.fields(self.kind))[:-1]
        self._start = b"data: " + start + b',"choices":[{"index":'
        self._end = b',"usage":null}\n\n' if head.wants_usage else b"}\n\n"
        self._counts: Counter[int] = Counter()  # of tokens, by choice

    def last(self, run: RequestRun) -> bytes:
        """A chunk of the usage without choices, if it was asked for, and `[DONE]`."""
        if not self._head.wants_usage:
            return DONE
        fields = {**self._head.fields(self.kind), "choices": [], "usage": usage_body(run.usage)}
        return b"data: " + orjson.dumps(fields) + b"\n\n" + DONE

    def error(self, body: Mapping[str, Any]) -> bytes:
        """The error as a chunk, and `[DONE]`."""
        return b"data: " + orjson.dumps(body) + b"\n\n" + DONE

    def _note_run(self, run: RequestRun) -> None:
        """What log-probabilities are told in, once it is known who answers."""
        self._run = run
        if self._head.wants_logprobs:
            self._texts = self._head.texts_of(run.tokenizer)

    def _chunk(self, index: int, content: bytes, logprobs: bytes, finish: str | None) -> bytes:
        reason = b"null" if finish is None else b'"' + finish.encode() + b'"'
        return b'%b%d,%b,%b"finish_reason":%b}]%b' % (
            self._start,
            index,
            content,
            logprobs,
            reason,
            self._usage_so_far(index) if self._head.wants_counts else self._end,
        )

    def _usage_so_far(self, index: int) -> bytes:
        """The end of a chunk with the counts of its choice."""
        stream = self._run.streams[index // self._head.num_answers]
        num_prompt_tokens, num_tokens = len(stream.prompt_token_ids), self._counts[index]
        counts = {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
        }
        return b',"usage":' + orjson.dumps(counts) + b"}\n\n"


class ChatChunks(ChunkWriter):
    """`chat.completion.chunk`."""

    kind = "chat.completion.chunk"

    def first(self, run: RequestRun) -> bytes:
        self._note_run(run)
        role = b'"delta":{"role":"assistant","content":""}'
        return b"".join(self._chunk(index, role, b"", None) for index in range(self._head.num_answers))

    def delta(self, prompt: int, delta: Delta) -> bytes:
        self._counts[delta.index] += len(delta.token_ids)
        logprobs = b""
        if self._head.wants_logprobs and delta.logprobs:
            logprobs = b'"logprobs":' + orjson.dumps(chat_logprobs(delta.logprobs, self._texts)) + b","
        head = self._head
        reasoning = delta.reasoning if head.wants_reasoning else ""
        if not (delta.text or logprobs or delta.finish_reason or reasoning or delta.tool_calls):
            return b""
        if not (reasoning or delta.tool_calls):
            content = b'"content":' + orjson.dumps(delta.text) if delta.text else b""
            return self._chunk(
                delta.index, b'"delta":{' + content + b"}", logprobs, finish_reason(delta.finish_reason, head)
            )
        fields: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if reasoning:
            fields |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if delta.tool_calls:
            fields |= self._calls(delta.tool_calls)
        content = b'"delta":' + orjson.dumps(fields)
        return self._chunk(delta.index, content, logprobs, finish_reason(delta.finish_reason, head))

    def _calls(self, calls: Sequence[ToolCallDelta]) -> dict[str, Any]:
        functions = [
            {"arguments": call.arguments}
            if call.id is None
            else {"name": call.name, "arguments": call.arguments}
            for call in calls
        ]
        if self._head.is_legacy:
            return {"function_call": functions[0]}
        return {
            "tool_calls": [
                {"index": call.index, "function": function}
                if call.id is None
                else {"index": call.index, "id": call.id, "type": "function", "function": function}
                for call, function in zip(calls, functions, strict=True)
            ]
        }


class CompletionChunks(ChunkWriter):
    """`text_completion` chunks; answer i of prompt p is choice p * n + i, begun with `echoed[p]`, if any."""

    kind = "text_completion"

    def __init__(self, head: AnswerHead, echoed: Sequence[Prompt | None]) -> None:
        super().__init__(head)
        self._echoed = echoed

    def first(self, run: RequestRun) -> bytes:
        self._note_run(run)
        n = self._head.num_answers
        texts = [echoed_text(echo, run.tokenizer) for echo in self._echoed for _ in range(n)]
        self._offsets = [len(text) for text in texts]
        if self._head.wants_logprobs:  # then a prompt is repeated with its log-probabilities
            return b""
        return b"".join(
            self._chunk(index, b'"text":' + orjson.dumps(text), b'"logprobs":null,', None)
            for index, text in enumerate(texts)
            if text
        )

    def delta(self, prompt: int, delta: Delta) -> bytes:
        index = prompt * self._head.num_answers + delta.index
        echo = b"" if delta.prompt_logprobs is None else self._echo(index, prompt, delta.prompt_logprobs)
        self._counts[index] += len(delta.token_ids)
        return echo + self._answer(index, delta)

    def _echo(self, index: int, prompt: int, of_prompt: PromptLogprobs) -> bytes:
        """The prompt and what is known of its tokens."""
        echoed = self._echoed[prompt]
        if echoed is None or not self._head.wants_logprobs:
            return b""
        fields = echo_logprobs(echoed, self._run.streams[prompt].prompt_token_ids, of_prompt, self._texts)
        text = orjson.dumps(echoed_text(echoed, self._run.tokenizer))
        return self._chunk(index, b'"text":' + text, b'"logprobs":' + orjson.dumps(fields) + b",", None)

    def _answer(self, index: int, delta: Delta) -> bytes:
        logprobs = b'"logprobs":null,'
        if self._head.wants_logprobs and delta.logprobs:
            logprobs = b'"logprobs":' + orjson.dumps(self._logprobs(index, delta.logprobs)) + b","
        elif not (delta.text or delta.finish_reason):
            return b""
        return self._chunk(index, b'"text":' + orjson.dumps(delta.text), logprobs, delta.finish_reason)

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        fields = completion_logprobs(logprobs, self._texts, self._offsets[index])
        self._offsets[index] += sum(map(len, fields["tokens"]))
        return fields


def likeliest(answers: Sequence[Completion], count: int) -> list[Completion]:
    """The `count` answers of the highest mean log-probability, best first; all in order if no more."""
    if len(answers) <= count:
        return list(answers)
    return sorted(answers, key=mean_logprob, reverse=True)[:count]


def mean_logprob(answer: Completion) -> float:
    """Natural log, per token; 0 of an answer without tokens."""
    logprobs = answer.logprobs or []
    return sum(one.logprob for one in logprobs) / max(1, len(logprobs))


def usage_body(usage: Usage | None) -> dict[str, Any] | None:
    """OpenAI's shape of token counts; None stays None."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_prediction_tokens,
            "rejected_prediction_tokens": usage.rejected_prediction_tokens,
        },
    }
