"""Prompts for the middle of a text, in the forms of code models, with their tokens and with templates."""
# ruff: noqa: RUF001  (tokens of DeepSeek)

import copy
from typing import Any

import pytest
from loraserve.adapters.manifest import AdapterManifest
from loraserve.engine.prepared import prepare
from loraserve.errors import AdapterFormatError, InvalidRequestError
from loraserve.request import GenerateRequest
from loraserve.sampling_params import SamplingParams
from loraserve.text.infill import FORMS, infill_form
from loraserve.text.tokenizer import Tokenizer

FAMILIES = [
    ("<fim_prefix>", "<fim_prefix>def f(<fim_suffix>)\n<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_prefix|>def f(<|fim_suffix|>)\n<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁begin｜>def f(<｜fim▁hole｜>)\n<｜fim▁end｜>"),
    ("▁<PRE>", "▁<PRE> def f( ▁<SUF>)\n ▁<MID>"),
    ("[PREFIX]", "[SUFFIX])\n[PREFIX]def f("),
]


@pytest.mark.parametrize(("mark", "prompt"), FAMILIES)
def test_tokens_show_the_form(mark: str, prompt: str, hf_smollm2_tokenizer: Any) -> None:
    form = next(one for one in FORMS if mark in one.marks)
    extended = copy.deepcopy(hf_smollm2_tokenizer)
    extended.add_special_tokens({"additional_special_tokens": [*form.marks, *form.ends]})
    tokenizer = Tokenizer(extended.backend_tokenizer, special_tokens={"eos_token": extended.eos_token})
    request = GenerateRequest(prompt="def f(", suffix=")\n", params=SamplingParams(stop_token_ids=(7,)))
    prepared = prepare(request, tokenizer, 1024)
    assert prepared.prompt_token_ids == extended(prompt)["input_ids"]
    marks = [extended.convert_tokens_to_ids(one) for one in form.marks]
    assert set(marks) <= set(prepared.prompt_token_ids)
    ends = {extended.convert_tokens_to_ids(one) for one in form.ends}
    assert set(prepared.params.stop_token_ids) == {7, *ends}


def test_texts_with_the_names_of_places_are_texts() -> None:
    form = infill_form("{suffix}|{prefix}", lambda _: None)
    assert form.prompt("a {suffix}", "{prefix} b") == "{prefix} b|a {suffix}"


def test_a_model_without_such_tokens_refuses(hf_smollm2_tokenizer: Any) -> None:
    tokenizer = Tokenizer(hf_smollm2_tokenizer.backend_tokenizer, special_tokens={})
    with pytest.raises(InvalidRequestError, match="infill_template"):
        prepare(GenerateRequest(prompt="a", suffix="b"), tokenizer, 1024)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [1, 2], "suffix": "b"}, "needs a prompt that is text"),
        ({"messages": [{"role": "user", "content": "x"}], "suffix": "b"}, "needs a prompt that is text"),
        ({"prompt": "a", "suffix": 3}, "must be text"),
        ({"prompt": "a", "suffix": "b", "truncate": 3}, "truncated"),
    ],
)
def test_what_goes_with_no_suffix(fields: Any, words: str, hf_smollm2_tokenizer: Any) -> None:
    tokenizer = Tokenizer(hf_smollm2_tokenizer.backend_tokenizer, special_tokens={})
    with pytest.raises(InvalidRequestError, match=words):
        prepare(GenerateRequest(**fields), tokenizer, 1024)


def test_a_manifest_gives_the_template() -> None:
    manifest = AdapterManifest.from_fields({"infill_template": "<P>{prefix}<S>{suffix}<M>"}, "test")
    assert AdapterManifest.from_fields(manifest.to_fields(), "again") == manifest
    assert infill_form(manifest.infill_template, lambda _: None).prompt("a", "b") == "<P>a<S>b<M>"
    for template in ("{prefix}", "{prefix}{suffix}{prefix}", "", 3, "{suffix}"):
        with pytest.raises(AdapterFormatError, match="once each"):
            AdapterManifest.from_fields({"infill_template": template}, "test")
