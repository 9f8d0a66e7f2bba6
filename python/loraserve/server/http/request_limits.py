"""Limits of one request that the launcher sets; what they refuse says limit and remedy."""

from __future__ import annotations

from loraserve.errors import InvalidRequestError
from loraserve.server.http.state import HttpLimits


def check_num_prompts(num_prompts: int, limits: HttpLimits) -> None:
    limit = limits.max_client_batch_size
    if num_prompts > limit:
        raise InvalidRequestError(f"the request has {num_prompts} prompts, limit is {limit}: send several")


def check_num_input_tokens(num_tokens: int, limits: HttpLimits) -> None:
    limit = limits.max_input_tokens
    if limit is not None and num_tokens > limit:
        raise InvalidRequestError(f"prompt has {num_tokens} tokens, limit is {limit}: send a shorter one")


def check_best_of(best_of: int, limits: HttpLimits) -> None:
    if not 1 <= best_of <= limits.max_best_of:
        raise InvalidRequestError(f"best_of is {best_of}, it must be from 1 to {limits.max_best_of}")


def check_stop(stop: str | tuple[str, ...], limits: HttpLimits) -> None:
    num_strings = 1 if isinstance(stop, str) else len(stop)
    if num_strings > limits.max_stop_sequences:
        limit = limits.max_stop_sequences
        raise InvalidRequestError(f"stop has {num_strings} strings, limit is {limit}: send fewer")


def check_top_n_tokens(top_n_tokens: int, limits: HttpLimits) -> None:
    if not 0 <= top_n_tokens <= limits.max_top_n_tokens:
        limit = limits.max_top_n_tokens
        raise InvalidRequestError(f"top_n_tokens is {top_n_tokens}, it must be from 0 to {limit}")
