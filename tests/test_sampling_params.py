"""SamplingParams remember what was given, however they are made; an adapter's defaults replace the rest."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
from loraserve.errors import InvalidRequestError
from loraserve.sampling_params import SamplingParams

GIVEN = SamplingParams(temperature=0.0, stop="x")
DEFAULTS = {"temperature": 0.7, "max_tokens": 200, "stop": ("y",), "seed": 4}


@pytest.mark.parametrize(
    ("params", "given"),
    [
        (SamplingParams(), set()),
        (GIVEN, {"temperature", "stop"}),
        (SamplingParams(max_tokens=16), {"max_tokens"}),
        (dataclasses.replace(GIVEN), {"temperature", "stop"}),
        (dataclasses.replace(GIVEN, seed=1), {"temperature", "stop", "seed"}),
        (dataclasses.replace(GIVEN, seed=None), {"temperature", "stop", "seed"}),
        (dataclasses.replace(GIVEN, max_tokens=16, n=1), {"temperature", "stop", "max_tokens", "n"}),
        (dataclasses.replace(dataclasses.replace(SamplingParams(), n=2), top_k=0), {"n", "top_k"}),
        (dataclasses.replace(SamplingParams().with_defaults(DEFAULTS), top_p=0.5), {"top_p"}),
        (GIVEN.with_defaults(DEFAULTS), {"temperature", "stop"}),
        (copy.copy(GIVEN), {"temperature", "stop"}),
        (copy.deepcopy(GIVEN), {"temperature", "stop"}),
        (pickle.loads(pickle.dumps(GIVEN)), {"temperature", "stop"}),
    ],
)
def test_what_was_given_stays_given(params: SamplingParams, given: set[str]) -> None:
    assert params.given == given
    filled = params.with_defaults(DEFAULTS)
    for name, value in DEFAULTS.items():
        assert getattr(filled, name) == (getattr(params, name) if name in given else value)


def test_a_replaced_value_is_checked_and_equality_is_of_values() -> None:
    with pytest.raises(InvalidRequestError, match="temperature"):
        dataclasses.replace(GIVEN, temperature=-1.0)
    assert SamplingParams(max_tokens=16) == SamplingParams()
    assert hash(SamplingParams(max_tokens=16)) == hash(SamplingParams())
    assert "_given" not in repr(GIVEN)


def test_an_unknown_name_is_refused() -> None:
    wrong: dict[str, Any] = {"temprature": 0.0}
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(**wrong)
