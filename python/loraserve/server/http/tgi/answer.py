"""Answers as TGI words them, whole and as a stream; with LoRAX' fields beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import orjson

from loraserve.request import Completion, Delta, FinishReason, GenerateRequest, TokenLogprob
from loraserve.sampling_params import SamplingParams
from loraserve.server.http.openai.answer import likeliest
from loraserve.server.http.openai.echo import prompt_logprobs_of
from loraserve.server.http.state import HttpState
from loraserve.server.http.tgi.schema import Parameters
from loraserve.server.http.token_texts import TokenTexts
from loraserve.server.request_run import RequestRun

TgiFinish: TypeAlias = Literal["length", "eos_token", "stop_sequence"]


class WholeGenerate:
    """One generate response, or for POST / an array of it."""

    def __init__(
        self, state: HttpState, request: GenerateRequest, given: Parameters, *, is_array: bool
    ) -> None:
        self._state = state
        self._request = request
        self._given = given
        self._is_array = is_array

    def body(self, run: RequestRun, answers: Sequence[Sequence[Completion]]) -> Any:
        best = likeliest(answers[0], 1)[0]
        place = next(index for index, answer in enumerate(answers[0]) if answer is best)
        others = [(index, answer) for index, answer in enumerate(answers[0]) if index != place]
        body: dict[str, Any] = {"generated_text": self._text(best)}
        if self._given.details:
            prompt_ids = run.streams[0].prompt_token_ids
            self._texts = self._state.texts_of(run.tokenizer)
            self._of_prompt = prompt_logprobs_of(answers[0])
            body["details"] = self._details(best, place, prompt_ids)
            if others:
                body["details"]["best_of_sequences"] = [
                    {"generated_text": self._text(answer), **self._details(answer, index, prompt_ids)}
                    for index, answer in others
                ]
        return [body] if self._is_array else body

    def _text(self, answer: Completion) -> str:
        prompt = self._request.prompt if self._given.return_full_text else ""
        return f"{prompt}{answer.text}"

    def _details(self, answer: Completion, index: int, prompt_ids: Sequence[int]) -> dict[str, Any]:
        texts = self._texts
        details: dict[str, Any] = {
            "finish_reason": tgi_finish(
                answer.finish_reason, answer.token_ids[-1:], self._request.params, texts
            ),
            "prompt_tokens": len(prompt_ids),
            "generated_tokens": len(answer.token_ids),
            "seed": _seed(self._request.params, index),
            "prefill": self._prefill(prompt_ids),
            "tokens": self._tokens(answer, prompt_ids),
        }
        if self._given.top_n_tokens:
            details["top_tokens"] = [
                _top_tokens(one, self._given.top_n_tokens, texts) for one in answer.logprobs or []
            ]
        return details

    def _prefill(self, prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Prompt tokens, where asked for; the first has no log-probability."""
        if self._of_prompt is None:
            return []
        triples = zip(prompt_ids, self._texts.texts(prompt_ids), self._of_prompt, strict=True)
        return [
            {"id": id_, "text": text, "logprob": None if one is None else one.logprob}
            for id_, text, one in triples
        ]

    def _tokens(self, answer: Completion, prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Each token with the text that it completes; joined, these are the text."""
        texts, logprobs = self._texts, answer.logprobs or []
        completed = texts.texts([one.token_id for one in logprobs], prompt_ids)
        return [
            _token(one, text, texts.is_special(one.token_id), self._given, texts)
            for one, text in zip(logprobs, completed, strict=True)
        ]


class GenerateEvents:
    """`data:{…}` per token; the last one carries the whole text and the details."""

    def __init__(self, state: HttpState, request: GenerateRequest, given: Parameters) -> None:
        self._state = state
        self._params = request.params
        self._given = given
        self._parts: list[str] = [str(request.prompt)] if given.return_full_text else []
        self._index = 0

    def first(self, run: RequestRun) -> bytes:
        self._num_prompt_tokens = run.num_prompt_tokens
        self._texts = self._state.texts_of(run.tokenizer)
        return b""

    def delta(self, prompt: int, delta: Delta) -> bytes:
        self._index += len(delta.token_ids)
        self._parts.append(delta.text)
        token, top = self._token_and_top(delta)
        end = self._end(delta)
        return b'data:{"index":%d,"token":%b,%b%b}\n\n' % (self._index, orjson.dumps(token), top, end)

    def last(self, run: RequestRun) -> bytes:
        return b""

    def error(self, body: Mapping[str, Any]) -> bytes:
        return b"data:" + orjson.dumps(body) + b"\n\n"

    def _token_and_top(self, delta: Delta) -> tuple[dict[str, Any], bytes]:
        if not delta.logprobs:  # an end without a token
            return {"id": self._texts.end_id, "text": delta.text, "logprob": 0.0, "special": True}, b""
        one = delta.logprobs[-1]
        is_special = self._texts.is_special(one.token_id) and not delta.text
        text = self._texts.text(one.token_id) if is_special else delta.text
        token = _token(one, text, is_special, self._given, self._texts)
        if not self._given.top_n_tokens:
            return token, b""
        top = _top_tokens(one, self._given.top_n_tokens, self._texts)
        return token, b'"top_tokens":' + orjson.dumps(top) + b","

    def _end(self, delta: Delta) -> bytes:
        if delta.finish_reason is None:
            return b'"generated_text":null,"details":null'
        details = {
            "finish_reason": tgi_finish(delta.finish_reason, delta.token_ids, self._params, self._texts),
            "generated_tokens": self._index,
            "seed": _seed(self._params, delta.index),
            "input_length": self._num_prompt_tokens,
            "prompt_tokens": self._num_prompt_tokens,
        }
        text = orjson.dumps("".join(self._parts))
        return b'"generated_text":%b,"details":%b' % (text, orjson.dumps(details))


def tgi_finish(
    finish: FinishReason | None, last_ids: Sequence[int], params: SamplingParams, texts: TokenTexts
) -> TgiFinish:
    """TGI tells the model's own end from a stop string; the end of a grammar counts as the model's own."""
    if finish == "length":
        return "length"
    is_end_token = bool(last_ids) and texts.ends_sequence(last_ids[-1])
    is_grammar_end = params.grammar is not None and not params.stop
    return "eos_token" if is_end_token or is_grammar_end else "stop_sequence"


def _token(
    one: TokenLogprob, text: str, is_special: bool, given: Parameters, texts: TokenTexts
) -> dict[str, Any]:
    token = {"id": one.token_id, "text": text, "logprob": one.logprob, "special": is_special}
    if given.return_k_alternatives:
        top = one.top[: given.return_k_alternatives]
        token["alternative_tokens"] = [
            {"id": id_, "text": texts.text(id_), "logprob": value} for id_, value in top
        ]
    return token


def _top_tokens(one: TokenLogprob, count: int, texts: TokenTexts) -> list[dict[str, Any]]:
    return [
        {"id": id_, "text": texts.text(id_), "logprob": value, "special": texts.is_special(id_)}
        for id_, value in one.top[:count]
    ]


def _seed(params: SamplingParams, index: int) -> int | None:
    """The unsigned seed that answer `index` was drawn with; None of a greedy one."""
    return None if params.is_greedy or params.seed is None else (params.seed + index) % 2**64
