"""Requests to token ids, token ids to text: what every frontend shares."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from numbers import Real
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.registry import RegisteredAdapter
from loraserve.adapters.text import common_text, without_weightless
from loraserve.engine.engine import Engine
from loraserve.engine.sequence import EngineOutputs, SequenceEnd, SequenceRecord
from loraserve.errors import AdapterNotFoundError, InvalidRequestError
from loraserve.request import (
    SHARED_CACHE,
    AdapterSpec,
    CacheScope,
    ChatOptions,
    Delta,
    FinishReason,
    GenerateRequest,
    TokenLogprob,
    Usage,
)
from loraserve.sampling.grammar_compiler import GrammarMatcher
from loraserve.sampling_params import SamplingParams
from loraserve.text.detokenizer import IncrementalDetokenizer, StopStrings
from loraserve.text.tokenizer import Tokenizer

MAX_ADAPTERS_PER_REQUEST = 16
MAX_DEADLINE_S = 24 * 3600.0
MAX_TRUNCATED_CONTEXTS = 8  # prompts of more contexts than this are refused, even if to be truncated
MAX_CACHE_SALT_CHARS = 256
MAX_ADAPTER_WEIGHT = 1000.0  # beyond, sums of deltas lose all meaning in bfloat16
MIN_ADAPTER_WEIGHT = 0.001  # below, a delta is lost in the rounding of what it is added to
MAX_PREPARED_AGAIN = 3  # of a request, whose adapters are replaced meanwhile
ALL_PARAMETERS = frozenset(parameter.name for parameter in fields(SamplingParams))

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class PreparedRequest:
    """A request the engine understands: token ids, (adapter, weight) pairs, checked parameters.

    `tokenizer` has its tokens and their ends, those of its adapters or the model's; `registered` is what its
    adapters' names meant.
    """

    request: GenerateRequest
    prompt_token_ids: list[int]
    adapters: list[tuple[str, float]]
    params: SamplingParams
    tokenizer: Tokenizer
    arrived_at: float
    deadline_s: float | None
    registered: Mapping[str, RegisteredAdapter | None]
    cache_scope: CacheScope = SHARED_CACHE
    needs_adapter: bool = False
    matcher: GrammarMatcher | None = None


def prepare(
    request: GenerateRequest,
    tokenizer: Tokenizer,
    max_model_len: int,
    find_adapter: Callable[[str], RegisteredAdapter | None] = lambda _: None,
    sampling_defaults: Mapping[str, Any] = MappingProxyType({}),
    arrived_at: float | None = None,
    merged: str | None = None,
) -> PreparedRequest:
    """Tokenise and resolve a request, which arrived at that time on `time.monotonic`; None is now.

    The manifest of its one adapter fills the gaps of its parameters, then what lies beside its adapters, then
    the model's `sampling_defaults`. `tokenizer` is the model's; adapters may have another (`common_text`).
    `merged` is the adapter that the model has become; a request that names none asks for it.

    Raises:
        InvalidRequestError: not exactly one of prompt and messages, an empty prompt, a bad adapter spec, or
            adapters that bring different tokens, templates or defaults.
    """
    arrived_at = time.monotonic() if arrived_at is None else arrived_at
    check_deadline(request.deadline_s)
    _check_cache_salt(request.cache_salt)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("give exactly one of prompt and messages")
    if request.messages is None and request.chat != ChatOptions():
        raise InvalidRequestError("chat options are given with a prompt, they need messages")
    max_num_tokens = _max_prompt_tokens(request.truncate, max_model_len)
    adapters = resolve_adapters(request.adapter)
    if not adapters and merged is not None:
        adapters = [(merged, 1.0)]
    registered = {name: find_adapter(name) for name in without_weightless(adapters)}
    named = {name: found for name, found in registered.items() if found is not None}
    adapter = named.get(adapters[0][0]) if len(adapters) == 1 else None
    text_of_adapters = common_text(
        tokenizer,
        {name: found.text for name, found in named.items()},
        needs_template=request.messages is not None and request.chat.chat_template is None,
        given=request.params.given if request.uses_model_defaults else ALL_PARAMETERS,
    )
    tokenizer = text_of_adapters.tokenizer
    if request.messages is not None:
        if not request.messages:
            raise InvalidRequestError("messages is empty, give at least one message")
        manifest = AdapterManifest() if adapter is None else adapter.manifest
        messages = manifest.with_system_prompt(request.messages)
        text = _render_chat(messages, request.chat, tokenizer)
        tokenizer.check_fits(text, max_num_tokens - 1, "prompt")
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    elif isinstance(request.prompt, str):
        tokenizer.check_fits(request.prompt, max_num_tokens - 1, "prompt")
        token_ids = tokenizer.encode(request.prompt)
    else:
        token_ids = _integers(request.prompt)
    if request.truncate is not None:
        token_ids = token_ids[-request.truncate :]
    if not token_ids:
        raise InvalidRequestError("the prompt is empty, give at least one token")
    if len(token_ids) >= max_model_len:
        raise InvalidRequestError(
            f"prompt has {len(token_ids)} tokens, limit is {max_model_len - 1}: "
            "the context length less one token to generate"
        )
    defaults = (
        {**sampling_defaults, **text_of_adapters.sampling_defaults} if request.uses_model_defaults else {}
    )
    if adapter is not None:
        defaults |= adapter.manifest.request_defaults
    params = request.params.with_defaults(defaults) if defaults else request.params
    cache_scope = (request.tenant, request.cache_salt or "")
    return PreparedRequest(
        request,
        token_ids,
        adapters,
        params,
        tokenizer,
        arrived_at,
        request.deadline_s,
        registered,
        cache_scope,
        needs_adapter=not request.may_use_base_model,
    )


def resolve_adapters(spec: AdapterSpec) -> list[tuple[str, float]]:
    """(name, weight) pairs of an adapter spec; the base model is no pair.

    Raises:
        InvalidRequestError: it is of another type, has too many adapters, or a weight is out of range.
    """
    if spec is None:
        return []
    if isinstance(spec, str):
        return [(spec, 1.0)]
    if not isinstance(spec, Mapping):
        raise InvalidRequestError(f"adapter is {spec!r}, give None, a name, or a mapping of names to weights")
    if not 0 < len(spec) <= MAX_ADAPTERS_PER_REQUEST:
        raise InvalidRequestError(
            f"adapter names {len(spec)} adapters, give from 1 to {MAX_ADAPTERS_PER_REQUEST}"
        )
    for name, weight in spec.items():
        if not isinstance(name, str):
            raise InvalidRequestError(f"adapter name is {name!r}, it must be a string")
        if not isinstance(weight, Real) or not abs(weight) <= MAX_ADAPTER_WEIGHT:
            raise InvalidRequestError(
                f"weight of adapter {name!r} is {weight!r}, it must be a number "
                f"from -{MAX_ADAPTER_WEIGHT:g} to {MAX_ADAPTER_WEIGHT:g}"
            )
        if 0.0 < abs(weight) < MIN_ADAPTER_WEIGHT:
            raise InvalidRequestError(
                f"weight of adapter {name!r} is {weight!r}, too small to change anything: "
                f"give 0, or at least {MIN_ADAPTER_WEIGHT:g}"
            )
    return [(name, float(weight)) for name, weight in spec.items()]


class ActiveSequence:
    """One of the n answers to a request: turns what the engine gives it into deltas of text."""

    def __init__(self, index: int, prepared: PreparedRequest, record: SequenceRecord) -> None:
        tokenizer = prepared.tokenizer
        self._index = index
        self._num_prompt_tokens = len(prepared.prompt_token_ids)
        self._num_tokens = 0
        self._end_ids = {*tokenizer.eos_token_ids, *prepared.params.stop_token_ids}
        self._detokenizer = IncrementalDetokenizer(tokenizer, prepared.prompt_token_ids)
        self._stop_strings = StopStrings(prepared.params.stop_strings)
        self._record = record

    def push(self, token_id: int, logprob: TokenLogprob | None) -> Delta:
        """What a token adds behind which the engine goes on; the last delta if it ends a stop string."""
        self._num_tokens += 1
        text = self._detokenizer.push_one(token_id)
        logprobs = None if logprob is None else [logprob]
        if self._stop_strings.stops:
            text = self._stop_strings.push(text)
            if self._stop_strings.is_matched:
                return self._last(text, [token_id], logprobs, "stop")
        return Delta(self._index, text, [token_id], logprobs, None, None)

    def end(self, end: SequenceEnd) -> Delta:
        """The last delta.

        Raises:
            LoraserveError: the sequence failed.
        """
        if end.error is not None:
            raise end.error
        token_ids = [] if end.token_id is None else [end.token_id]
        self._num_tokens += len(token_ids)
        text = self._last_text(token_ids, end.finish_reason)
        finish = "stop" if self._stop_strings.is_matched else end.finish_reason
        return self._last(text, token_ids, None if end.logprob is None else [end.logprob], finish)

    def _last_text(self, token_ids: list[int], finish: FinishReason | None) -> str:
        """New text without the end token, and what was held back."""
        is_end_token = finish == "stop" and bool(token_ids) and token_ids[-1] in self._end_ids
        text = self._detokenizer.push([] if is_end_token else token_ids) + self._detokenizer.flush()
        text = self._stop_strings.push(text)
        return text if self._stop_strings.is_matched else text + self._stop_strings.flush()

    def _last(
        self,
        text: str,
        token_ids: list[int],
        logprobs: list[TokenLogprob] | None,
        finish: FinishReason | None,
    ) -> Delta:
        record = self._record
        usage = Usage(
            self._num_prompt_tokens,
            self._num_tokens,
            record.num_cached_tokens,
            min(record.num_accepted_tokens, self._num_tokens),  # some may stand behind a stop string
            record.num_draft_tokens - record.num_accepted_tokens,
        )
        return Delta(self._index, text, token_ids, logprobs, finish, usage, self._record.timing())


class Frontend(Generic[Owner]):
    """Submits requests to an engine and hands every delta to the owner of its request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tokenizer = engine.runner.model.tokenizer
        self._active: dict[int, tuple[ActiveSequence, Owner]] = {}

    def prepare(self, request: GenerateRequest, arrived_at: float | None = None) -> PreparedRequest:
        """Tokenise and resolve a request and compile its grammar; slow, call it off the loop.

        `arrived_at` is on `time.monotonic`, None is now.

        Raises:
            InvalidRequestError: as of the function `prepare`, and where the grammar can't be used.
        """
        prepared = prepare(
            request,
            self._tokenizer,
            self._engine.max_model_len,
            self._engine.adapters.find,
            self._engine.runner.model.sampling_defaults,
            arrived_at,
            self._engine.config.merge,
        )
        grammar = prepared.params.grammar
        if grammar is None:
            return prepared
        matcher = self._engine.grammars.compile(grammar, prepared.cache_scope, prepared.tokenizer)
        return replace(prepared, matcher=matcher)

    def tokenizer_for(self, spec: AdapterSpec) -> Tokenizer:
        """What `prepare` tokenises prompts for these adapters with.

        Raises:
            AdapterNotFoundError: an adapter does not exist.
            InvalidRequestError: as of `resolve_adapters`, or several bring different tokens.
        """
        texts = {}
        merged = self._engine.config.merge
        adapters = resolve_adapters(spec) or ([] if merged is None else [(merged, 1.0)])
        for name in without_weightless(adapters):
            found = self._engine.adapters.find(name)
            if found is None:
                raise AdapterNotFoundError(f"adapter {name!r} is not registered")
            texts[name] = found.text
        return common_text(self._tokenizer, texts, needs_template=False, given=ALL_PARAMETERS).tokenizer

    def submit(self, prepared: PreparedRequest, owner: Owner) -> list[int]:
        """Queue all n sequences of a request, or none; their request ids.

        Answer i is drawn with the request's seed + i.

        Raises:
            AdapterReplacedError: a name of its adapters has another meaning now: prepare it again.
            LoraserveError: as of `Engine.submit`.
        """
        request_ids: list[int] = []
        params = prepared.params
        try:
            for index in range(params.n):
                seed = None if params.seed is None else params.seed + index
                record = SequenceRecord(prepared.arrived_at)
                request_id = self._engine.submit(
                    prepared.prompt_token_ids,
                    prepared.adapters,
                    params,
                    seed,
                    record=record,
                    deadline_s=prepared.deadline_s,
                    cache_scope=prepared.cache_scope,
                    needs_adapter=prepared.needs_adapter,
                    matcher=prepared.matcher and prepared.matcher.copy(),
                    eos_token_ids=prepared.tokenizer.eos_token_ids,
                    registered=prepared.registered,
                )
                request_ids.append(request_id)
                sequence = ActiveSequence(index, prepared, record)
                self._active[request_id] = (sequence, owner)
        except BaseException:
            self.abort(request_ids)
            raise
        return request_ids

    def abort(self, request_ids: Iterable[int]) -> None:
        """End sequences now, without further deltas."""
        for request_id in request_ids:
            if self._active.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def route(
        self,
        outputs: EngineOutputs,
        on_delta: Callable[[Owner, Delta], object],
        on_error: Callable[[Owner, Exception], object],
    ) -> None:
        """Turn what a step gave into deltas; a sequence ended by a stop string is aborted in the engine."""
        active, logprobs = self._active, outputs.logprobs or repeat(None)
        tokens = zip(outputs.request_ids, outputs.token_ids, strict=True)
        for (request_id, token_id), logprob in zip(tokens, logprobs, strict=False):
            found = active.get(request_id)
            if found is None:
                continue  # aborted: nobody waits for it
            sequence, owner = found
            try:
                delta = sequence.push(token_id, logprob)
            except Exception as error:
                self.abort([request_id])
                on_error(owner, error)
                continue
            if delta.finish_reason is not None:
                self.abort([request_id])
            on_delta(owner, delta)
        for end in outputs.ends:
            found = active.pop(end.request_id, None)
            if found is None:
                continue
            sequence, owner = found
            try:
                delta = sequence.end(end)
            except Exception as error:
                on_error(owner, error)
                continue
            on_delta(owner, delta)


def check_deadline(deadline_s: Any) -> None:
    """Raises InvalidRequestError: it is no number of seconds that a request may be given."""
    if deadline_s is None:
        return
    if not isinstance(deadline_s, Real) or not 0.0 < float(deadline_s) <= MAX_DEADLINE_S:
        raise InvalidRequestError(
            f"deadline_s is {deadline_s!r}, it must be a number of seconds in (0, {MAX_DEADLINE_S:g}]"
        )


def _check_cache_salt(salt: Any) -> None:
    if salt is None:
        return
    if not isinstance(salt, str):
        raise InvalidRequestError(f"cache_salt is {salt!r:.100}, it must be text")
    if not 0 < len(salt) <= MAX_CACHE_SALT_CHARS:
        raise InvalidRequestError(
            f"cache_salt has {len(salt)} characters, it must have from 1 to {MAX_CACHE_SALT_CHARS}; "
            "leave it out for none"
        )
    if any("\ud800" <= char <= "\udfff" for char in salt):
        raise InvalidRequestError("cache_salt is not valid Unicode")


def _max_prompt_tokens(truncate: Any, max_model_len: int) -> int:
    """A prompt that is sure to have as many tokens is refused untokenised."""
    if truncate is None:
        return max_model_len
    if isinstance(truncate, bool) or not isinstance(truncate, int) or truncate < 1:
        raise InvalidRequestError(f"truncate is {truncate!r}, it must be at least 1 token")
    return MAX_TRUNCATED_CONTEXTS * max_model_len


def _render_chat(
    messages: Sequence[Mapping[str, Any]],
    options: ChatOptions,
    tokenizer: Tokenizer,
) -> str:
    template = None
    if options.chat_template is not None:
        template = tokenizer.build_chat_template(options.chat_template)
        template.check()
    return tokenizer.apply_chat_template(
        messages,
        options.begins_answer,
        template=template,
        continue_final_message=options.continue_final_message,
        kwargs=options.template_kwargs,
    )


def _integers(token_ids: Any) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in token_ids]
    except TypeError as error:
        raise InvalidRequestError(f"a prompt is a string or integers: {error}") from None
