"""What callers give one of for all prompts, or one for each: prompts, adapters, parameters."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from loraserve.errors import InvalidRequestError
from loraserve.sampling_params import SamplingParams

Prompt: TypeAlias = str | Sequence[int]


def as_prompts(prompts: Any) -> list[Prompt]:
    """A list of prompts; one string, or one list of token ids, is one prompt. Raises InvalidRequestError."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        items = list(prompts)
    except TypeError:
        raise InvalidRequestError(f"prompts is {prompts!r}, give a string or a list") from None
    return [items] if items and _is_integer(items[0]) else items


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def per_request(value: Any, num_requests: int, name: str) -> list[Any]:
    """One for each request, where `value` is one for all or as many. Raises InvalidRequestError."""
    if value is None or isinstance(value, str | Mapping | SamplingParams):
        return [value] * num_requests
    if not isinstance(value, Sequence):
        raise InvalidRequestError(
            f"{name} is {value!r}, give one for all prompts or a list with one for each"
        )
    if len(value) != num_requests:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {num_requests} prompts")
    return list(value)


def params_per_request(value: Any, num_requests: int) -> list[SamplingParams]:
    """As `per_request` of sampling parameters, None standing for the defaults. Raises InvalidRequestError."""
    params = [one or SamplingParams() for one in per_request(value, num_requests, "params")]
    for one in params:
        if not isinstance(one, SamplingParams):
            raise InvalidRequestError(f"params is {one!r}, give SamplingParams")
    return params
