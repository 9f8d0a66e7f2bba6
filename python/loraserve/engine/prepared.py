"""`PreparedRequest`: what a request means, checked, rendered and tokenised."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.registry import RegisteredAdapter
from loraserve.adapters.text import common_text, without_weightless
from loraserve.config import EngineConfig
from loraserve.engine.answer_form import AnswerForm, answer_form
from loraserve.engine.versions import base_name
from loraserve.errors import InvalidRequestError, PromptTooLongError
from loraserve.pooling.head import ClassificationHead
from loraserve.pooling.params import PoolingKind, PoolingParams
from loraserve.request import (
    SHARED_CACHE,
    AdapterSpec,
    CacheScope,
    ChatOptions,
    GenerateRequest,
)
from loraserve.sampling.matcher import Matcher
from loraserve.sampling.prediction import Prediction
from loraserve.sampling_params import SamplingParams
from loraserve.text.infill import InfillForm, infill_form
from loraserve.text.tokenizer import Tokenizer

MAX_ADAPTERS_PER_REQUEST = 16
MAX_DEADLINE_S = 24 * 3600.0
MAX_TRUNCATED_CONTEXTS = 8  # prompts of more contexts than this are refused, even if to be truncated
MAX_CACHE_SALT_CHARS = 256
MAX_USER_CHARS = 512
MAX_ADAPTER_WEIGHT = 1000.0  # beyond, sums of deltas lose all meaning in bfloat16
MIN_ADAPTER_WEIGHT = 0.001  # below, a delta is lost in the rounding of what it is added to
ALL_PARAMETERS = frozenset(parameter.name for parameter in fields(SamplingParams))


@dataclass(frozen=True)
class PreparedRequest:
    """A request the engine understands: token ids, (adapter, weight) pairs, checked parameters.

    `tokenizer` has its tokens and their ends, those of its adapters or the model's; `registered` is what its
    adapters' names meant; `form` is of a chat's answers, None where all of them is content; `pooling` is
    what becomes of its hidden states, `head` what classifies, where that is asked for.
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
    form: AnswerForm | None = None
    matcher: Matcher | None = None
    pooling: PoolingParams | None = None
    head: ClassificationHead | None = None
    prediction: Prediction | None = None

    @property
    def generations(self) -> dict[str, int]:
        """Of each adapter, by its name without one."""
        found = self.registered.values()
        return {base_name(one.name): one.generation for one in found if one is not None}

    @property
    def num_sequences(self) -> int:
        """How many the engine runs for it."""
        return 1 if self.pooling is not None else self.params.n


def prepare(
    request: GenerateRequest,
    tokenizer: Tokenizer,
    max_model_len: int,
    find_adapter: Callable[[str], RegisteredAdapter | None] = lambda _: None,
    route: Callable[[str, str | None], str] = lambda name, _: name,
    sampling_defaults: Mapping[str, Any] = MappingProxyType({}),
    arrived_at: float | None = None,
    config: EngineConfig | None = None,
    model_head: ClassificationHead | None = None,
    hidden_size: int | None = None,
    model_pooling: PoolingKind | None = None,
) -> PreparedRequest:
    """Tokenise and resolve a request, which arrived at that time on `time.monotonic`; None is now.

    The manifest of its one adapter fills the gaps of its parameters, then what lies beside its adapters, then
    the model's `sampling_defaults`. `tokenizer` is the model's; adapters may have another (`common_text`).
    `route` says which generation of an adapter a user gets.
    `config` is the engine's: a request that names no adapter asks for the one that the model has become.
    `model_head` is of a model that classifies; `hidden_size` bounds the dimensions of embeddings;
    `model_pooling` is how the model embeds, where its files say so.

    Raises:
        InvalidRequestError: not exactly one of prompt and messages, an empty prompt, a bad adapter spec, or
            adapters that bring different tokens, templates or defaults.
    """
    arrived_at = time.monotonic() if arrived_at is None else arrived_at
    check_deadline(request.deadline_s)
    _check_cache_salt(request.cache_salt)
    _check_user(request.user)
    _check_form(request, model_head)
    generates = request.pooling is None and request.params.max_tokens != 0
    if request.pooling is not None and hidden_size is not None:
        request.pooling.check_dimensions(hidden_size)
    merged = None if config is None else config.merge
    max_num_tokens = _max_prompt_tokens(request.truncate, max_model_len)
    adapters = [(route(name, request.user), weight) for name, weight in resolve_adapters(request.adapter)]
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
    manifest = AdapterManifest() if adapter is None else adapter.manifest
    token_ids, form = _prompt_tokens(request, tokenizer, manifest, max_num_tokens - generates, config)
    _check_length(len(token_ids), max_model_len, generates=generates)
    defaults = (
        {**sampling_defaults, **text_of_adapters.sampling_defaults} if request.uses_model_defaults else {}
    )
    defaults |= manifest.request_defaults
    params = request.params.with_defaults(defaults) if defaults else request.params
    if infill := _infill_form(request, manifest, tokenizer):
        ends = (tokenizer.id_of(end) for end in infill.ends)
        ids = {*params.stop_token_ids, *(token_id for token_id in ends if token_id is not None)}
        params = replace(params, stop_token_ids=tuple(sorted(ids)))
    if form is not None and params.grammar is not None and request.chat.tools.may_call:
        form = form.with_text_form(params.grammar)
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
        form=form,
        pooling=request.pooling and request.pooling.with_default(manifest.pooling or model_pooling),
        head=_head(request, adapters, named, model_head),
        prediction=_prediction(request, tokenizer, max_model_len, config),
    )


def _check_form(request: GenerateRequest, model_head: ClassificationHead | None) -> None:
    """Whether it says once what the prompt is, and asks for something that the model does."""
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequestError("give exactly one of prompt and messages")
    if request.messages is None and request.chat != ChatOptions():
        raise InvalidRequestError("chat options are given with a prompt, they need messages")
    _check_suffix(request)
    if request.prompt_pair is not None and not isinstance(request.prompt, str):
        raise InvalidRequestError("prompt_pair is behind a prompt that is text, give that")
    if request.pooling is None and model_head is not None:
        raise InvalidRequestError(
            "the model classifies and has no head that predicts tokens: it can't generate, classify with it"
        )


def _prompt_tokens(
    request: GenerateRequest,
    tokenizer: Tokenizer,
    manifest: AdapterManifest,
    limit: int,
    config: EngineConfig | None,
) -> tuple[list[int], AnswerForm | None]:
    """The prompt's tokens and the form of a chat's answers; texts of far more than `limit` tokens fail."""
    form: AnswerForm | None = None
    if request.messages is not None:
        if not request.messages:
            raise InvalidRequestError("messages is empty, give at least one message")
        messages = manifest.with_system_prompt(request.messages)
        text = _render_chat(messages, request.chat, tokenizer)
        if request.pooling is None:
            form = answer_form(request.chat, text, tokenizer, manifest, config)
        tokenizer.check_fits(text, limit, "prompt")
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    elif isinstance(request.prompt, str):
        infill, text = _infill_form(request, manifest, tokenizer), request.prompt
        if infill is not None:
            text = infill.prompt(text, request.suffix or "")
        tokenizer.check_fits(text, limit, "prompt")
        if request.prompt_pair is None:
            token_ids = tokenizer.encode(text)
        else:
            tokenizer.check_fits(request.prompt_pair, limit, "prompt_pair")
            token_ids = tokenizer.encode_pair(request.prompt, request.prompt_pair)
    else:
        token_ids = _integers(request.prompt)
    if request.truncate is not None:
        token_ids = token_ids[-request.truncate :]
    return token_ids, form


def _check_length(num_tokens: int, max_model_len: int, *, generates: bool) -> None:
    if num_tokens == 0:
        raise InvalidRequestError("the prompt is empty, give at least one token")
    limit = max_model_len - 1 if generates else max_model_len
    if num_tokens > limit:
        less = " less one token to generate" if generates else ""
        raise PromptTooLongError(
            f"prompt has {num_tokens} tokens, limit is {limit}: the context length{less}"
        )


def _head(
    request: GenerateRequest,
    adapters: Sequence[tuple[str, float]],
    named: Mapping[str, RegisteredAdapter],
    model_head: ClassificationHead | None,
) -> ClassificationHead | None:
    """What classifies: the head of the request's one adapter, else the model's."""
    if request.pooling is None or request.pooling.task != "classify":
        return None
    with_heads = [name for name, _ in adapters if name in named and named[name].head is not None]
    if with_heads and (len(adapters) > 1 or adapters[0][1] != 1.0):
        raise InvalidRequestError(
            f"adapter {with_heads[0]!r} has a head, which is no delta that could be weighted or summed: "
            "classify with it alone and weight 1"
        )
    head = named[with_heads[0]].head if with_heads else model_head
    if head is None:
        who = f"adapter {adapters[0][0]!r} has" if adapters else "the model has"
        raise InvalidRequestError(
            f"{who} no head to classify with: name an adapter that was trained with one (task_type SEQ_CLS, "
            "with score or classifier in its file)"
        )
    return head


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


def _check_user(user: Any) -> None:
    if user is None:
        return
    if not isinstance(user, str):
        raise InvalidRequestError(f"user is {user!r:.100}, it must be text")
    if not 0 < len(user) <= MAX_USER_CHARS:
        raise InvalidRequestError(
            f"user has {len(user)} characters, it must have from 1 to {MAX_USER_CHARS}; leave it out for none"
        )


def _check_suffix(request: GenerateRequest) -> None:
    if request.suffix is None:
        return
    if not isinstance(request.suffix, str):
        raise InvalidRequestError(f"suffix is {request.suffix!r:.100}, it must be text")
    if not isinstance(request.prompt, str):
        raise InvalidRequestError("suffix is given, it needs a prompt that is text")
    if request.truncate is not None:
        raise InvalidRequestError("suffix is given with a truncated prompt, which would cut its marks")
    if request.prompt_pair is not None or request.pooling is not None:
        raise InvalidRequestError("suffix is of a prompt that is continued, leave it out")


def _prediction(
    request: GenerateRequest, tokenizer: Tokenizer, max_model_len: int, config: EngineConfig | None
) -> Prediction | None:
    """What is expected of the answer, where the engine makes guesses and the request wants them."""
    if request.prediction is None:
        return None
    if not isinstance(request.prediction, str):
        raise InvalidRequestError(f"prediction is {request.prediction!r:.100}, it must be text")
    tokenizer.check_fits(request.prediction, max_model_len, "prediction")
    if config is None or config.speculate == "off" or request.params.speculate is False:
        return None
    return Prediction(tokenizer.encode(request.prediction, add_special_tokens=False)[:max_model_len])


def _infill_form(
    request: GenerateRequest, manifest: AdapterManifest, tokenizer: Tokenizer
) -> InfillForm | None:
    """How the prompt of a request with a suffix is written."""
    return None if request.suffix is None else infill_form(manifest.infill_template, tokenizer.id_of)


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
    template = tokenizer.chat_template
    if options.chat_template is not None:
        template = tokenizer.build_chat_template(options.chat_template)
        template.check()
    tools = options.tools
    if tools.may_call and template is not None and not template.takes_tools:
        raise InvalidRequestError(
            "tools are given, but the chat template has no place for them: set tool_choice to none, or serve "
            "an adapter whose chat template reads the variable tools"
        )
    return tokenizer.apply_chat_template(
        messages,
        options.begins_answer,
        template=template,
        continue_final_message=options.continue_final_message,
        kwargs=options.template_kwargs,
        tools=[tool.for_template() for tool in tools.tools],
    )


def _integers(token_ids: Any) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in token_ids]
    except TypeError as error:
        raise InvalidRequestError(f"a prompt is a string or integers: {error}") from None
