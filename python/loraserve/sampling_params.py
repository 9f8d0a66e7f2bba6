"""How one request's tokens are chosen and when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field, fields
from itertools import takewhile
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.sampling.grammar import Grammar
from loraserve.validation.values import check_bool, check_float, check_int

MAX_N = 128
MAX_TOKENS = 2**31 - 1
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MIN_TEMPERATURE = 1e-5  # below, dividing logits by it would overflow: taken as greedy


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request; checked when built.

    Which values were given, rather than left to their defaults, is remembered: an adapter's own defaults
    replace only the others. `dataclasses.replace` keeps what was given as given, and adds what it changes.

    Args:
        max_tokens: most tokens to generate, at least 1, or 0 where only `prompt_logprobs` are asked for; also
            bounded by the context. None is as many as fit the context and the memory.
        temperature: 0 (or below 1e-5) is greedy; otherwise logits are divided by it.
        top_p: smallest set of tokens whose probability reaches this, in (0, 1].
        top_k: the k most likely tokens; 0 keeps all.
        min_p: tokens at least this fraction as likely as the likeliest, in [0, 1].
        typical_p: tokens whose surprise is nearest to the expected one, as many as have this probability
            together, in (0, 1] (locally typical sampling, arXiv:2202.00666); 1 keeps all.
        repetition_penalty: divides (positive) or multiplies (negative) logits of tokens already seen
            in the prompt or the answer (CTRL, arXiv:1909.05858); 1 is off.
        presence_penalty: subtracted once from logits of tokens already in the answer, in [-2, 2].
        frequency_penalty: subtracted per occurrence in the answer, in [-2, 2].
        logit_bias: token id → what is added to its logit, from -100 to 100.
        seed: makes the tokens reproducible whatever else is in the batch; None draws one.
        stop: strings that end the answer; they are cut from it.
        stop_token_ids: tokens that end the answer, besides the model's own end tokens.
        ignore_eos: go on past the model's end tokens.
        min_tokens: no end token before this many.
        logprobs: None for none; k ≥ 0 gives each chosen token's and the k likeliest tokens' natural-log
            probabilities, of the model's own distribution (before penalties and temperature).
        prompt_logprobs: None for none; k ≥ 0 gives the same of each token of the prompt but the first.
            Nothing of the prompt comes from the cache then.
        grammar: the form the answer must have; None leaves it free. It ends where the grammar ends.
        speculate: False computes its tokens one by one where the engine guesses ahead (`speculate` of
            EngineConfig); True asks for guesses, None leaves it to the engine. The answer is the same.
        n: independent answers to the same prompt.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    _given: InitVar[frozenset[str]] = frozenset()  # first: see __new__
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    speculate: bool | None = None
    n: int = 1

    def __new__(cls, **values: Any) -> SamplingParams:
        """`dataclasses.replace` passes what it changes first and then, from `_given` on, copies."""
        params = super().__new__(cls)
        named = takewhile(lambda name: name != "_given", values)
        object.__setattr__(params, "_named", frozenset(named))
        return params

    def __post_init__(self, _given: frozenset[str]) -> None:
        object.__setattr__(self, "_given", _given | self.__dict__.pop("_named"))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _as_tuple("stop", stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, int(self.prompt_logprobs is None), MAX_TOKENS)
        max_tokens = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        check_int("min_tokens", self.min_tokens, 0, max_tokens)
        check_int("top_k", self.top_k, 0, 2**31 - 1)
        check_int("n", self.n, 1, MAX_N)
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_bool("ignore_eos", self.ignore_eos)
        if self.speculate is not None:
            check_bool("speculate", self.speculate)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens == 0 and self.n > 1:
            raise InvalidRequestError(f"n is {self.n}, but max_tokens is 0: there is one prompt, set n to 1")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InvalidRequestError(f"grammar is {self.grammar!r:.100}, give a Grammar")
        object.__setattr__(self, "logit_bias", _checked_logit_bias(self.logit_bias))
        _check_stop(self.stop, self.stop_token_ids)

    def with_defaults(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """These, with `defaults` for what was not given; they don't count as given afterwards.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        values = {parameter.name: getattr(self, parameter.name) for parameter in fields(self)}
        values |= {name: value for name, value in defaults.items() if name not in self.given}
        return SamplingParams(_given=self.given, **values)

    @property
    def given(self) -> frozenset[str]:
        """Names of the values that were given."""
        given: frozenset[str] = self.__dict__["_given"]
        return given

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the likeliest one, and no seed matters."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, always as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop


def _as_tuple(name: str, values: object) -> tuple[object, ...]:
    if values is None:
        return ()
    if not isinstance(values, Iterable):
        raise InvalidRequestError(f"{name} is {values!r:.100}, it must be a list")
    return tuple(values)


def _check_stop(stop: object, stop_token_ids: tuple[object, ...]) -> None:
    strings = stop if isinstance(stop, tuple) else ()
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has {len(strings)} strings, the limit is {MAX_STOP_STRINGS}")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidRequestError(f"stop contains {string!r:.100}, each must be a non-empty string")
    for token_id in stop_token_ids:
        check_int("stop_token_ids", token_id, 0, 2**31 - 1)


def _checked_logit_bias(logit_bias: object) -> dict[int, float]:
    if logit_bias is None:
        return {}
    if not isinstance(logit_bias, Mapping):
        raise InvalidRequestError(f"logit_bias is {logit_bias!r:.100}, give {{token id: number}}")
    if len(logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequestError(f"logit_bias has {len(logit_bias)} tokens, the limit is {MAX_LOGIT_BIASES}")
    for token_id, bias in logit_bias.items():
        check_int("logit_bias token", token_id, 0, 2**31 - 1)
        check_float("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    return {int(token_id): float(bias) for token_id, bias in logit_bias.items()}
