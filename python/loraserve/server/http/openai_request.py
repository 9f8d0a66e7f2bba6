"""OpenAI bodies to engine requests: what a client gave, and a refusal of what means nothing here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.grammar import Grammar
from loraserve.request import AdapterSpec, GenerateRequest
from loraserve.sampling_params import SamplingParams
from loraserve.server.http.generation import Call
from loraserve.server.http.model_names import adapter_of
from loraserve.server.http.openai_schema import (
    ChatCompletionBody,
    CompletionBody,
    GenerationBody,
    Message,
    ResponseFormat,
)
from loraserve.server.http.request_limits import check_best_of, check_num_prompts, check_stop

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
    "min_tokens",
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
    if body.suffix:
        raise InvalidRequestError("suffix is not supported: the model only continues text")
    if body.echo and body.logprobs is not None:
        raise InvalidRequestError(
            "echo with logprobs is not supported: a prompt's own log-probabilities are not computed, "
            "set one of them"
        )
    given = _sampling(call, body, body.max_tokens)
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
    if body.best_of is not None:
        _compare_answers(call, body, given)
    prompts = prompts_of(body)
    check_num_prompts(len(prompts), call.state.limits)
    return [_request(call, body, SamplingParams(**given), prompt=prompt) for prompt in prompts]


def chat_request(call: Call, body: ChatCompletionBody) -> GenerateRequest:
    """Raises InvalidRequestError."""
    _refuse_tools(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    given = _sampling(call, body, max_tokens)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError(f"top_logprobs is {body.top_logprobs}, set logprobs to true to use it")
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    if "max_tokens" in given:
        params = SamplingParams(**given)
    else:  # an answer may fill the context, unless the adapter's manifest says otherwise
        params = SamplingParams(**given | {"min_tokens": 0}).with_defaults(
            {"max_tokens": call.state.max_model_len}
        )
        if "min_tokens" in given:
            params = SamplingParams(**given, max_tokens=call.state.max_model_len)
    return _request(call, body, params, messages=[_message(message) for message in body.messages])


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise InvalidRequestError("prompt is an empty list, give at least one prompt")
    return list(prompt)


def _request(
    call: Call,
    body: GenerationBody,
    params: SamplingParams,
    *,
    prompt: str | Sequence[int] | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
) -> GenerateRequest:
    adapter: AdapterSpec = adapter_of(body.model, body.adapters, call.state.served_names)
    return GenerateRequest(
        prompt=prompt,
        messages=messages,
        adapter=adapter,
        params=params,
        deadline_s=call.deadline_s,
        truncate=body.truncate_prompt_tokens,
    )


def _sampling(call: Call, body: GenerationBody, max_tokens: int | None) -> dict[str, Any]:
    """What `SamplingParams` takes, of the fields that were given."""
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k
    if body.stop is not None:
        given["stop"] = body.stop if isinstance(body.stop, str) else tuple(body.stop)
        check_stop(given["stop"], call.state.limits)
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.logit_bias is not None:
        given["logit_bias"] = _logit_bias(body.logit_bias)
    grammar = _grammar(body)
    if grammar is not None:
        given["grammar"] = grammar
    return given


def _compare_answers(call: Call, body: CompletionBody, given: dict[str, Any]) -> None:
    """`best_of` answers are made, and the likeliest `n` of them sent."""
    best_of, n = body.best_of or 0, given.get("n", 1)
    check_best_of(best_of, call.state.limits)
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
    if body.response_format is not None:
        from_format = _format_grammar(body.response_format)
        found += [] if from_format is None else [from_format]
    if len(found) > 1:
        raise InvalidRequestError(f"{len(found)} forms of the answer are given, choose one")
    return found[0] if found else None


def _format_grammar(form: ResponseFormat) -> Grammar | None:
    match form.type:
        case "text":
            return None
        case "json_object":
            schema = form.json_object_schema
            return Grammar("json") if schema is None else Grammar("json_schema", schema)
        case "json_schema":
            wrapped = form.json_schema
            schema = form.json_object_schema if wrapped is None else wrapped.json_schema
            if schema is None:
                raise InvalidRequestError("response_format has no json_schema.schema, give one")
            return Grammar("json_schema", schema)
        case "regex":
            return Grammar("regex", _given(form.regex, "regex"))
        case "grammar":
            return Grammar("lark", _given(form.grammar, "grammar"))
        case "choice":
            return Grammar("choice", _given(form.choice, "choice"))


def _given(value: Any, name: str) -> Any:
    if value is None:
        raise InvalidRequestError(f"response_format has no {name}, give one")
    return value


def _message(message: Message) -> dict[str, Any]:
    content = message.content
    if content is None:
        text = ""
    elif isinstance(content, str):
        text = content
    else:
        text = "".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    named = {} if message.name is None else {"name": message.name}
    return {"role": role, "content": text, **named}


def _refuse_tools(body: ChatCompletionBody) -> None:
    if body.tools or body.functions:
        raise InvalidRequestError("tools are not supported, ask for a form with response_format instead")
    if body.audio is not None or (body.modalities and body.modalities != ["text"]):
        raise InvalidRequestError('only text is generated, set modalities to ["text"]')
