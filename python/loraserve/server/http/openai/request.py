"""OpenAI bodies to engine requests: what a client gave, and a refusal of what means nothing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.request import AdapterSpec, ChatOptions, GenerateRequest
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import MAX_LOGPROBS, SamplingParams
from loraserve.server.http.adapter_selectors import adapter_of
from loraserve.server.http.call import Call
from loraserve.server.http.chat_turns import chat_params
from loraserve.server.http.openai.chat import chat_options, template_messages
from loraserve.server.http.openai.schema import (
    ChatCompletionBody,
    CompletionBody,
    GenerationBody,
    ResponseFormat,
    StructuredOutputs,
)
from loraserve.validation.values import check_int

_SAME_NAME = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "speculate",
    "min_tokens",
    "prompt_logprobs",
    "n",
)
_GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "lark",
}


def completion_requests(call: Call, body: CompletionBody) -> list[GenerateRequest]:
    """One request per prompt. Raises InvalidRequestError."""
    given = _sampling(body, body.max_tokens)
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        _score_prompt(body, given)
    if body.best_of is not None:
        _compare_answers(call, body, given)
    prompts = prompts_of(body)
    call.state.limits.check_num_prompts(len(prompts))
    adapter = adapter_of(call.state, call.caller, body.model, body, num_prompts=len(prompts))
    params = SamplingParams(**given)
    suffix = body.suffix or None  # OpenAI's clients send "" for none
    return [_request(call, body, adapter, params, prompt=prompt, suffix=suffix) for prompt in prompts]


def chat_request(call: Call, body: ChatCompletionBody) -> GenerateRequest:
    """Raises InvalidRequestError."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    given = _sampling(body, max_tokens)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError(f"top_logprobs is {body.top_logprobs}, set logprobs to true to use it")
    if body.logprobs:
        check_int("top_logprobs", body.top_logprobs or 0, 0, MAX_LOGPROBS)
        given["logprobs"] = body.top_logprobs or 0
    params = chat_params(given)
    adapter = adapter_of(call.state, call.caller, body.model, body)
    messages = template_messages(body.messages)
    return _request(call, body, adapter, params, messages=messages, chat=chat_options(body))


def truncation(call: Call, wanted: int | None, max_tokens: int | None) -> int | None:
    """Most tokens of a prompt that is to be cut, None for none; -1 leaves room for the answer.

    Args:
        call: who asks.
        wanted: `truncate_prompt_tokens` as it was given.
        max_tokens: of the answer; None for as many as there is room for, one at least.
    """
    if wanted != -1:
        return wanted
    limit, room = call.state.max_model_len, 1 if max_tokens is None else max_tokens
    return max(1, min(limit - min(room, limit - 1), call.state.limits.max_input_tokens or limit))


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """Texts or lists of token ids, one or many. Raises InvalidRequestError: there are none."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt is an empty list, give at least one prompt")
    return list(prompt)


def _request(
    call: Call,
    body: GenerationBody,
    adapter: AdapterSpec,
    params: SamplingParams,
    *,
    prompt: str | Sequence[int] | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    chat: ChatOptions | None = None,
    suffix: str | None = None,
) -> GenerateRequest:
    return GenerateRequest(
        prompt=prompt,
        messages=messages,
        chat=chat or ChatOptions(),
        adapter=adapter,
        params=params,
        suffix=suffix,
        prediction=None if body.prediction is None else body.prediction.text,
        deadline_s=call.deadline_s,
        truncate=truncation(call, body.truncate_prompt_tokens, params.max_tokens),
        cache_salt=body.cache_salt,
        user=body.asker,
    )


def _sampling(body: GenerationBody, max_tokens: int | None) -> dict[str, Any]:
    """What `SamplingParams` takes, of the fields that were given."""
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequestError("prompt_logprobs are not possible in a stream, set stream to false")
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k
    if body.stop is not None:
        given["stop"] = body.stop if isinstance(body.stop, str) else tuple(body.stop)
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    grammar = _grammar(body)
    if grammar is not None:
        given["grammar"] = grammar
    return given


def _score_prompt(body: CompletionBody, given: dict[str, Any]) -> None:
    """What is repeated has its own log-probabilities, as many as the answer's tokens."""
    if body.suffix and body.logprobs is not None:
        raise InvalidRequestError(
            "echo with logprobs and suffix are given, but what is repeated is the prompt without the tokens "
            "around it: leave one of them out"
        )
    if body.stream and max(body.n or 1, body.best_of or 1) > 1 and body.logprobs is not None:
        raise InvalidRequestError("a stream repeats a prompt with logprobs for one answer only: set n to 1")
    given["prompt_logprobs"] = max(body.logprobs or 0, body.prompt_logprobs or 0)


def _compare_answers(call: Call, body: CompletionBody, given: dict[str, Any]) -> None:
    """`best_of` answers are made, and the likeliest `n` of them sent."""
    best_of, n = body.best_of or 0, given.get("n", 1)
    call.state.limits.check_best_of(best_of)
    if best_of < n:
        raise InvalidRequestError(f"best_of is {best_of}, it must be at least n, which is {n}")
    if best_of == n:
        return
    if body.stream:
        raise InvalidRequestError(
            f"best_of is {best_of}, a stream can't compare answers: set stream to false"
        )
    given["n"] = best_of
    given.setdefault("logprobs", 0)


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token[:20]): bias for token, bias in given.items()}
    except ValueError:
        raise InvalidRequestError("logit_bias has a key that is no token id, give integers as text") from None


def _grammar(body: GenerationBody) -> Grammar | None:
    found = [
        Grammar(kind, value) for name, kind in _GUIDED.items() if (value := getattr(body, name)) is not None
    ]
    if body.structured_outputs is not None:
        found += _structured(body.structured_outputs)
    if body.response_format is not None:
        from_format = _format_grammar(body.response_format)
        found += [] if from_format is None else [from_format]
    if len(found) > 1:
        raise InvalidRequestError(f"{len(found)} forms of the answer are given, choose one")
    return found[0] if found else None


def _structured(outputs: StructuredOutputs) -> list[Grammar]:
    found = [Grammar("json")] if outputs.json_object else []
    for kind, value in (
        ("json_schema", outputs.json_form),
        ("regex", outputs.regex),
        ("choice", outputs.choice),
        ("lark", outputs.grammar),
    ):
        found += [] if value is None else [Grammar(kind, value)]
    if not found:
        raise InvalidRequestError(
            "structured_outputs asks for nothing, set one of json, regex, choice, grammar and json_object"
        )
    return found


_FORMAT_VALUES: dict[str, tuple[str, ...]] = {
    "text": (),
    "json_object": ("schema", "value"),
    "json": ("schema", "value"),
    "json_schema": ("json_schema", "schema", "value"),
    "regex": ("regex", "value"),
    "grammar": ("grammar",),
    "choice": ("choice",),
}


def _format_grammar(form: ResponseFormat) -> Grammar | None:
    given = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    taken = _FORMAT_VALUES[form.type]
    others = [name for name in given if name not in taken]
    if others:
        raise InvalidRequestError(f"response_format of type {form.type} takes no {others[0]}, leave it out")
    if len(given) > 1:
        raise InvalidRequestError(f"response_format has {' and '.join(given)}, give one of them")
    if form.type == "text":
        return None
    if not given and form.type in ("json_object", "json"):
        return Grammar("json")
    if not given:
        wanted = "json_schema.schema" if form.type == "json_schema" else taken[0]
        raise InvalidRequestError(f"response_format has no {wanted}, give one")
    (value,) = given.values()
    if "json_schema" in given:
        value = value.get("schema")
        if value is None:
            raise InvalidRequestError("response_format has no json_schema.schema, give one")
    kind = {"json_object": "json_schema", "json": "json_schema", "grammar": "lark"}.get(form.type, form.type)
    return Grammar(kind, value)
