"""Translates between the engine's values and the messages of proto/loraserve/v1, both ways."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from loraserve.errors import InvalidRequestError
from loraserve.request import (
    AdapterSpec,
    ChatOptions,
    Delta,
    FinishReason,
    GenerateRequest,
    RequestTiming,
    TokenLogprob,
    Usage,
)
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.wire.chats import call_delta_from_wire, call_delta_to_wire, chat_from_wire, chat_to_wire

if TYPE_CHECKING:
    from loraserve._core import Receipt
    from loraserve.engine.stats import AdapterInfo, EngineInfo
    from loraserve.engine.versions import GenerationInfo

_FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
    "tool_calls": pb.FINISH_REASON_TOOL_CALLS,
}
_FINISH_REASON_NAMES = {value: name for name, value in _FINISH_REASONS.items()}
MAX_ENTRIES = 2**20  # such as token ids
MAX_MESSAGES = 8192  # of a chat, as over HTTP
AS_MANY_AS_FIT = 0  # max_tokens on the wire, None in SamplingParams
_REPEATED_SAMPLING_FIELDS = {"stop", "stop_token_ids"}


def request_from_wire(message: pb.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequestError: no prompt, both adapter fields, or a sampling value out of range."""
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    chat = ChatOptions()
    match message.WhichOneof("prompt"):
        case "text":
            prompt = message.text
        case "token_ids":
            prompt = list(message.token_ids.ids)
        case "chat":
            messages, chat = chat_from_wire(message.chat)
        case _:
            raise InvalidRequestError("the request has no prompt, set one of text, token_ids and chat")
    return GenerateRequest(
        prompt=prompt,
        messages=messages,
        chat=chat,
        adapter=_adapter_from_wire(message),
        params=_sampling_from_wire(message.sampling, only_prompt=message.only_prompt),
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        truncate=message.truncate if message.HasField("truncate") else None,
        cache_salt=message.cache_salt if message.HasField("cache_salt") else None,
        suffix=message.suffix if message.HasField("suffix") else None,
        prediction=message.prediction if message.HasField("prediction") else None,
        user=message.user if message.HasField("user") else None,
    )


def check_known(message: Message, where: str = "") -> None:
    """Raises InvalidRequestError: a message, or one in it, has an unknown field, or too much in one."""
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        raise InvalidRequestError(
            f"{where}{message.DESCRIPTOR.name} has the field number {unknown[0].field_number}, which this "
            "server does not know: update the server, or leave the field out"
        )
    for field, value in message.ListFields():
        if not isinstance(value, str | bytes | int | float | Message) and len(value) > MAX_ENTRIES:
            raise InvalidRequestError(
                f"{where}{field.name} has {len(value)} entries, the limit is {MAX_ENTRIES}: send fewer"
            )
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if not isinstance(value, Message) and len(value) > MAX_MESSAGES:
            raise InvalidRequestError(
                f"{where}{field.name} has {len(value)} entries, the limit is {MAX_MESSAGES}: send fewer"
            )
        for inner in (value,) if isinstance(value, Message) else value:
            check_known(inner, f"{where}{field.name}.")


def _adapter_from_wire(message: pb.GenerateRequest) -> AdapterSpec:
    if message.adapter and message.adapters:
        raise InvalidRequestError("both adapter and adapters are set, set at most one of them")
    return message.adapter or dict(message.adapters) or None


def _sampling_from_wire(message: pb.SamplingParams, *, only_prompt: bool) -> SamplingParams:
    given: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    for name in _REPEATED_SAMPLING_FIELDS & given.keys():
        given[name] = tuple(given[name])
    if given.get("max_tokens") == AS_MANY_AS_FIT:
        given["max_tokens"] = None
    if only_prompt:
        given["max_tokens"] = 0
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
    if request.messages is None and request.chat != ChatOptions():
        raise InvalidRequestError("chat options are given with a prompt, they need messages")
    try:
        message = pb.GenerateRequest(
            sampling=_sampling_to_wire(request.params),
            deadline_s=request.deadline_s,
            truncate=request.truncate,
            cache_salt=request.cache_salt,
            only_prompt=request.params.max_tokens == 0,
            suffix=request.suffix,
            prediction=request.prediction,
            user=request.user,
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
        message.chat.CopyFrom(chat_to_wire(request.messages, request.chat))
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
    if params.max_tokens is None:
        values["max_tokens"] = AS_MANY_AS_FIT
    elif params.max_tokens == 0:
        del values["max_tokens"]  # `only_prompt` says so
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
    """Fields that are None are left out."""
    message = pb.GenerateResponse(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        reasoning=delta.reasoning,
        stop_string=delta.stop_string,
        generations=delta.generations,
    )
    message.tool_calls.extend(call_delta_to_wire(call) for call in delta.tool_calls)
    message.logprobs.extend(_logprob_to_wire(logprob) for logprob in delta.logprobs or ())
    of_prompt = [logprob for logprob in delta.prompt_logprobs or () if logprob is not None]
    message.prompt_logprobs.extend(_logprob_to_wire(logprob) for logprob in of_prompt)
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
        accepted_prediction_tokens=usage.accepted_prediction_tokens,
        rejected_prediction_tokens=usage.rejected_prediction_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def delta_from_wire(message: pb.GenerateResponse) -> Delta:
    """As the server's engine gave it; fields left out are None, and so are empty log-probabilities."""
    return Delta(
        index=message.index,
        text=message.text,
        token_ids=list(message.token_ids),
        logprobs=[_logprob_from_wire(logprob) for logprob in message.logprobs] or None,
        finish_reason=_FINISH_REASON_NAMES.get(message.finish_reason),
        usage=_usage_from_wire(message.usage) if message.HasField("usage") else None,
        timing=_timing_from_wire(message.timing) if message.HasField("timing") else None,
        reasoning=message.reasoning,
        tool_calls=tuple(map(call_delta_from_wire, message.tool_calls)),
        prompt_logprobs=[None, *map(_logprob_from_wire, message.prompt_logprobs)]
        if message.prompt_logprobs
        else None,
        stop_string=message.stop_string if message.HasField("stop_string") else None,
        generations=dict(message.generations),
    )


def _logprob_from_wire(message: pb.TokenLogprob) -> TokenLogprob:
    top = [(entry.token_id, entry.logprob) for entry in message.top]
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, top=top)


def _usage_from_wire(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        accepted_prediction_tokens=message.accepted_prediction_tokens,
        rejected_prediction_tokens=message.rejected_prediction_tokens,
        reasoning_tokens=message.reasoning_tokens,
    )


def _timing_from_wire(message: pb.Timing) -> RequestTiming:
    return RequestTiming(
        queue_s=message.queue_s,
        prefill_s=message.prefill_s if message.HasField("prefill_s") else None,
        total_s=message.total_s,
        adapter_was_resident=message.adapter_was_resident,
    )


def receipt_to_wire(receipt: Receipt) -> pb.Receipt:
    """Of a base model that the adapter's config does not name, ""."""
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
        base_copies=receipt.base_copies,
        not_used=receipt.not_used,
        notes=receipt.notes,
    )


def adapters_to_wire(adapters: Iterable[AdapterInfo]) -> pb.ListAdaptersResponse:
    """Sorted by name, with every path and count; who may see them is for the server to say."""
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
        num_uninvoked=adapter.num_uninvoked,
        last_load_s=adapter.last_load_s,
        generation=adapter.generation,
    )


def generations_to_wire(generations: Iterable[GenerationInfo]) -> pb.ListGenerationsResponse:
    """The message has the fields of `GenerationInfo`, by name."""
    return pb.ListGenerationsResponse(generations=[pb.Generation(**asdict(one)) for one in generations])


def info_to_wire(info: EngineInfo) -> pb.GetServerInfoResponse:
    """The message has the fields of `EngineInfo`, by name."""
    return pb.GetServerInfoResponse(**asdict(info))
