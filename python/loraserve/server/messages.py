"""Translates between the engine's values and the messages of proto/loraserve/v1, both ways."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from loraserve.errors import InvalidRequestError
from loraserve.grammar import Grammar
from loraserve.request import (
    AdapterSpec,
    Delta,
    FinishReason,
    GenerateRequest,
    RequestTiming,
    TokenLogprob,
    Usage,
)
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import loraserve_pb2 as pb

if TYPE_CHECKING:
    from loraserve._core import Receipt
    from loraserve.info import AdapterInfo, EngineInfo

_FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}
_FINISH_REASON_NAMES = {value: name for name, value in _FINISH_REASONS.items()}
_REPEATED_SAMPLING_FIELDS = {"stop", "stop_token_ids"}


def request_from_wire(message: pb.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequestError: no prompt, both adapter fields, or a sampling value out of range."""
    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None
    match message.WhichOneof("prompt"):
        case "text":
            prompt = message.text
        case "token_ids":
            prompt = list(message.token_ids.ids)
        case "chat":
            messages = [{"role": turn.role, "content": turn.content} for turn in message.chat.messages]
        case _:
            raise InvalidRequestError("the request has no prompt, set one of text, token_ids and chat")
    return GenerateRequest(
        prompt=prompt,
        messages=messages,
        adapter=_adapter_from_wire(message),
        params=_sampling_from_wire(message.sampling),
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
    )


def _adapter_from_wire(message: pb.GenerateRequest) -> AdapterSpec:
    if message.adapter and message.adapters:
        raise InvalidRequestError("both adapter and adapters are set, set at most one of them")
    return message.adapter or dict(message.adapters) or None


def _sampling_from_wire(message: pb.SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    for name in _REPEATED_SAMPLING_FIELDS & given.keys():
        given[name] = tuple(given[name])
    if message.logit_bias:
        given["logit_bias"] = dict(message.logit_bias)
    if message.HasField("grammar"):
        given["grammar"] = _grammar_from_wire(message.grammar)
    return SamplingParams(**given)


def _grammar_from_wire(message: pb.Grammar) -> Grammar:
    match message.WhichOneof("form"):
        case "json":
            return Grammar("json")
        case "choice":
            return Grammar("choice", message.choice.choices)
        case None:
            raise InvalidRequestError(
                "grammar has no form, set one of json, json_schema, regex, lark and choice"
            )
        case kind:
            return Grammar(kind, getattr(message, kind))


def request_to_wire(request: GenerateRequest) -> pb.GenerateRequest:
    """Raises InvalidRequestError: not exactly one prompt, or a value the wire format can't carry."""
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("give exactly one of prompt and messages")
    try:
        message = pb.GenerateRequest(
            sampling=_sampling_to_wire(request.params),
            deadline_s=request.deadline_s,
            truncate=request.truncate,
        )
        _set_prompt(message, request)
        _set_adapter(message, request.adapter)
    except KeyError as error:
        raise InvalidRequestError(f"a message has no {error}, give role and content") from None
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the request can't be sent: {error}") from error
    return message


def _set_prompt(message: pb.GenerateRequest, request: GenerateRequest) -> None:
    if request.messages is not None:
        turns = [pb.ChatMessage(role=turn["role"], content=turn["content"]) for turn in request.messages]
        message.chat.CopyFrom(pb.ChatMessages(messages=turns))
    elif isinstance(request.prompt, str):
        message.text = request.prompt
    else:
        message.token_ids.CopyFrom(pb.TokenIds(ids=request.prompt))


def _set_adapter(message: pb.GenerateRequest, adapter: AdapterSpec) -> None:
    if isinstance(adapter, str):
        message.adapter = adapter
    elif adapter is not None:
        message.adapters.update(adapter)


def _sampling_to_wire(params: SamplingParams) -> pb.SamplingParams:
    """What was given, and what differs from the defaults; the server's adapters may decide on the rest."""
    defaults = SamplingParams()
    names = [field.name for field in fields(params)]
    values = {
        name: getattr(params, name)
        for name in names
        if name in params.given or getattr(params, name) != getattr(defaults, name)
    }
    values = {name: value for name, value in values.items() if value is not None}
    if params.grammar is not None:
        values["grammar"] = _grammar_to_wire(params.grammar)
    return pb.SamplingParams(**values)


def _grammar_to_wire(grammar: Grammar) -> pb.Grammar:
    message = pb.Grammar()
    if grammar.kind == "json":
        message.json = True
    elif isinstance(grammar.value, tuple):
        message.choice.choices.extend(grammar.value)
    else:
        setattr(message, grammar.kind, grammar.value)
    return message


def delta_to_wire(delta: Delta) -> pb.GenerateResponse:
    message = pb.GenerateResponse(index=delta.index, text=delta.text, token_ids=delta.token_ids)
    message.logprobs.extend(_logprob_to_wire(logprob) for logprob in delta.logprobs or ())
    if delta.finish_reason is not None:
        message.finish_reason = _FINISH_REASONS[delta.finish_reason]
    if delta.usage is not None:
        message.usage.CopyFrom(_usage_to_wire(delta.usage))
    if delta.timing is not None:
        message.timing.CopyFrom(pb.Timing(**asdict(delta.timing)))
    return message


def _logprob_to_wire(logprob: TokenLogprob) -> pb.TokenLogprob:
    top = [pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in logprob.top]
    return pb.TokenLogprob(token_id=logprob.token_id, logprob=logprob.logprob, top=top)


def _usage_to_wire(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def delta_from_wire(message: pb.GenerateResponse) -> Delta:
    return Delta(
        index=message.index,
        text=message.text,
        token_ids=list(message.token_ids),
        logprobs=[_logprob_from_wire(logprob) for logprob in message.logprobs] or None,
        finish_reason=_FINISH_REASON_NAMES.get(message.finish_reason),
        usage=_usage_from_wire(message.usage) if message.HasField("usage") else None,
        timing=_timing_from_wire(message.timing) if message.HasField("timing") else None,
    )


def _logprob_from_wire(message: pb.TokenLogprob) -> TokenLogprob:
    top = [(entry.token_id, entry.logprob) for entry in message.top]
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, top=top)


def _usage_from_wire(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
    )


def _timing_from_wire(message: pb.Timing) -> RequestTiming:
    return RequestTiming(
        queue_s=message.queue_s,
        prefill_s=message.prefill_s if message.HasField("prefill_s") else None,
        total_s=message.total_s,
        adapter_was_resident=message.adapter_was_resident,
    )


def receipt_to_wire(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(
        tensors=receipt.tensors,
        modules=receipt.modules,
        layers=receipt.layers,
        rank=receipt.rank,
        ranks=receipt.ranks,
        nbytes=receipt.nbytes,
        hash=receipt.hash,
        base_check=receipt.base_check,
        base_model=receipt.base_model or "",
    )


def adapters_to_wire(adapters: Iterable[AdapterInfo]) -> pb.ListAdaptersResponse:
    by_name = sorted(adapters, key=lambda adapter: adapter.name)
    return pb.ListAdaptersResponse(adapters=[_adapter_to_wire(adapter) for adapter in by_name])


def _adapter_to_wire(adapter: AdapterInfo) -> pb.Adapter:
    return pb.Adapter(
        name=adapter.name,
        path=adapter.path,
        state=adapter.state,
        num_running=adapter.num_running,
        receipt=receipt_to_wire(adapter.receipt),
        num_waiting=adapter.num_waiting,
        is_pinned=adapter.is_pinned,
        description=adapter.description,
        num_loads=adapter.num_loads,
        num_evictions=adapter.num_evictions,
        last_load_s=adapter.last_load_s,
    )


def info_to_wire(info: EngineInfo) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(**asdict(info))
