"""TGI's and LoRAX' parameters to engine requests."""

from __future__ import annotations

import secrets
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.request import GenerateRequest
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import SamplingParams
from loraserve.server.http.adapter_selectors import adapter_of
from loraserve.server.http.call import Call
from loraserve.server.http.tgi.schema import AnyGenerateBody, GrammarField, Parameters

DEFAULT_MAX_NEW_TOKENS = 100
_SAME_NAME = (
    "temperature",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "top_k",
    "top_p",
    "typical_p",
    "speculate",
)


def generate_request(
    call: Call, body: AnyGenerateBody, given: Parameters, *, is_stream: bool
) -> GenerateRequest:
    """Raises InvalidRequestError: a value is out of its range, or means nothing together with another."""
    best_of = 1 if given.best_of is None else given.best_of
    _check_best_of(call, given, best_of, is_stream=is_stream)
    if is_stream and given.decoder_input_details:
        raise InvalidRequestError("decoder_input_details is not possible in a stream, set it to false")
    num_top = max(given.top_n_tokens or 0, given.return_k_alternatives or 0)
    call.state.limits.check_alternatives("top_n_tokens", num_top)
    sampling = _sampling(call, given)
    sampling["n"] = best_of
    if given.details and given.decoder_input_details:
        sampling["prompt_logprobs"] = 0
    if is_stream or given.details or best_of > 1:
        sampling["logprobs"] = num_top
    defaults = {
        "max_tokens": DEFAULT_MAX_NEW_TOKENS,
        "temperature": 1.0 if samples(given) else 0.0,
    }
    return GenerateRequest(
        prompt=body.inputs,
        adapter=adapter_of(call.state, call.caller, None, body, given),
        params=SamplingParams(**sampling).with_defaults(defaults),
        deadline_s=call.deadline_s,
        truncate=given.truncate,
        uses_model_defaults=False,  # TGI is greedy unless asked, whatever the model says
        cache_salt=given.cache_salt,
    )


def samples(given: Parameters) -> bool:
    """Whether tokens are drawn; TGI is greedy unless something of this is asked for."""
    return (
        given.do_sample
        or given.temperature not in (None, 0.0, 1.0)
        or given.top_k is not None
        or given.top_p not in (None, 1.0)
        or given.typical_p not in (None, 1.0)
    )


def _sampling(call: Call, given: Parameters) -> dict[str, Any]:
    values = {name: value for name in _SAME_NAME if (value := getattr(given, name)) is not None}
    if given.max_new_tokens is not None:
        values["max_tokens"] = min(given.max_new_tokens, call.state.max_model_len)
    if given.do_sample and given.temperature is None:
        values["temperature"] = 1.0
    elif given.temperature is not None and not samples(given):
        values["temperature"] = 0.0
    if given.stop:
        values["stop"] = tuple(given.stop)
    if given.ignore_eos_token:
        values["ignore_eos"] = True
    if samples(given):
        values["seed"] = _signed(secrets.randbits(64) if given.seed is None else given.seed)
    grammar = _grammar(given)
    if grammar is not None:
        values["grammar"] = grammar
    return values


def _check_best_of(call: Call, given: Parameters, best_of: int, *, is_stream: bool) -> None:
    call.state.limits.check_best_of(best_of)
    if best_of == 1:
        return
    if is_stream:
        raise InvalidRequestError(f"best_of is {best_of}, a stream can't compare answers: leave it out")
    if given.seed is not None:
        raise InvalidRequestError(f"best_of is {best_of} and seed is set, leave one of them out")
    if not samples(given):
        raise InvalidRequestError(f"best_of is {best_of} but nothing is sampled, set do_sample")


def _grammar(given: Parameters) -> Grammar | None:
    if given.grammar is not None and given.response_format is not None:
        raise InvalidRequestError("grammar and response_format are both set, set one of them")
    if given.response_format is not None:
        schema = given.response_format.json_object_schema
        return Grammar("json") if schema is None else Grammar("json_schema", schema)
    return None if given.grammar is None else _tgi_grammar(given.grammar)


def _tgi_grammar(grammar: GrammarField) -> Grammar:
    value = grammar.value
    if grammar.type == "regex":
        return Grammar("regex", value)
    if grammar.type == "json_schema" and isinstance(value, dict) and "schema" in value:
        value = value["schema"]
    return Grammar("json_schema", value)


def _signed(seed: int) -> int:
    """The signed number of the same 64 bits, which is what the sampler uses of it."""
    return seed - 2**64 if seed >= 2**63 else seed
