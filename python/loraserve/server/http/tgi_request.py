"""TGI's and LoRAX' parameters to engine requests."""

from __future__ import annotations

import secrets
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.grammar import Grammar
from loraserve.request import AdapterSpec, GenerateRequest
from loraserve.sampling_params import SamplingParams
from loraserve.server.http.generation import Call
from loraserve.server.http.model_names import registered_name
from loraserve.server.http.request_limits import check_best_of, check_stop, check_top_n_tokens
from loraserve.server.http.tgi_schema import GrammarField, MergedAdapters, Parameters

DEFAULT_MAX_NEW_TOKENS = 100
LORAX_BASE_MODEL = "__base_model__"
_SAME_NAME = ("temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p")


def generate_request(call: Call, inputs: str, given: Parameters, *, is_stream: bool) -> GenerateRequest:
    """Raises InvalidRequestError: a value is out of its range, or means nothing together with another."""
    if given.watermark:
        raise InvalidRequestError("watermark is not supported, set it to false")
    best_of = 1 if given.best_of is None else given.best_of
    _check_best_of(call, given, best_of, is_stream=is_stream)
    if is_stream and given.decoder_input_details:
        raise InvalidRequestError("decoder_input_details is not possible in a stream, set it to false")
    num_top = max(given.top_n_tokens or 0, given.return_k_alternatives or 0)
    check_top_n_tokens(num_top, call.state.limits)
    sampling = _sampling(call, given)
    sampling["n"] = best_of
    if is_stream or given.details or best_of > 1:
        sampling["logprobs"] = num_top
    defaults = {
        "max_tokens": DEFAULT_MAX_NEW_TOKENS,
        "temperature": 1.0 if samples(given) else 0.0,
    }
    return GenerateRequest(
        prompt=inputs,
        adapter=adapter_of(given, call.state.served_names),
        params=SamplingParams(**sampling).with_defaults(defaults),
        deadline_s=call.deadline_s,
        truncate=given.truncate,
        uses_model_defaults=False,  # TGI is greedy unless asked, whatever the model says
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


def adapter_of(given: Parameters, served_names: tuple[str, ...]) -> AdapterSpec:
    """The adapter these parameters name. Raises InvalidRequestError."""
    if given.adapter_source in ("s3", "pbase"):
        raise InvalidRequestError(
            f"adapter_source is {given.adapter_source!r}, but a request loads no adapters: "
            "name a loaded one, GET /v1/models lists them"
        )
    if given.merged_adapters is not None:
        if given.adapter_id is not None:
            raise InvalidRequestError("adapter_id and merged_adapters are both set, set one of them")
        return _merged(given.merged_adapters)
    if given.adapter_id in (None, LORAX_BASE_MODEL, *served_names):
        return None
    return None if given.adapter_id is None else registered_name(given.adapter_id)


def _merged(merged: MergedAdapters) -> dict[str, float]:
    if merged.merge_strategy not in (None, "linear"):
        raise InvalidRequestError(
            f"merge_strategy is {merged.merge_strategy!r}, only linear is supported: adapters are summed "
            "while they run, and ties and dare would need a new adapter made of them"
        )
    if len(merged.ids) != len(merged.weights):
        raise InvalidRequestError(
            f"merged_adapters has {len(merged.ids)} ids and {len(merged.weights)} weights, "
            "give as many of both"
        )
    total: dict[str, float] = {}
    for name, weight in zip(merged.ids, merged.weights, strict=True):
        total[registered_name(name)] = total.get(registered_name(name), 0.0) + weight
    return total


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
        check_stop(values["stop"], call.state.limits)
    if given.ignore_eos_token:
        values["ignore_eos"] = True
    if samples(given):
        values["seed"] = _signed(secrets.randbits(64) if given.seed is None else given.seed)
    grammar = _grammar(given)
    if grammar is not None:
        values["grammar"] = grammar
    return values


def _check_best_of(call: Call, given: Parameters, best_of: int, *, is_stream: bool) -> None:
    check_best_of(best_of, call.state.limits)
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
