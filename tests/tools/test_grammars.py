"""Forced calls of every family: what the grammar lets through is parsed as calls that fit their schemas."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from loraserve.engine.answer_form import AnswerForm
from loraserve.errors import InvalidRequestError
from loraserve.sampling.grammar import Grammar
from loraserve.sampling.grammar_compiler import GrammarCompiler, GrammarMatcher
from loraserve.text.tokenizer import Tokenizer
from loraserve.tools.families import CALLS, CALLS_BY_NAME
from loraserve.tools.formats.base import CallFormat
from loraserve.tools.tool import ToolOptions

from tests.tools.examples import EXAMPLES, TOOLS, Example
from tests.tools.test_parsers import assembled

SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["Rome", "Paris"]}},
    "required": ["place"],
    "additionalProperties": False,
}
NUM_ANSWERS = 16
MAX_TOKENS = 1500


@pytest.fixture(scope="module", params=["tokens", "text"])
def tokenizers(request: pytest.FixtureRequest, hf_smollm2_tokenizer: Any) -> Mapping[str, Tokenizer]:
    """By family, the demo model's tokens, the family's markers being special ones or texts as any other."""
    found = {}
    for one in CALLS:
        extended = copy.deepcopy(hf_smollm2_tokenizer)
        if request.param == "tokens":
            extended.add_special_tokens({"additional_special_tokens": list(one.markers)})
        found[one.names[0]] = Tokenizer(
            extended.backend_tokenizer, special_tokens={"eos_token": extended.eos_token}
        )
    return found


def form_of(family: CallFormat, tokenizer: Tokenizer, **fields: Any) -> AnswerForm:
    options = ToolOptions.from_fields(fields.pop("tools", TOOLS), fields.pop("choice", "required"), **fields)
    shown = {index: text for text in family.markers if (index := tokenizer.id_of(text)) is not None}
    return AnswerForm(options, family, None, False, None, shown)


def matcher_of(form: AnswerForm, tokenizer: Tokenizer) -> GrammarMatcher:
    assert form.forces_calls
    matcher = form.call_matcher(tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size).compile)
    assert isinstance(matcher, GrammarMatcher)
    return matcher


def sampled(matcher: GrammarMatcher, tokenizer: Tokenizer, seed: int) -> str | None:
    """The text of tokens drawn alike from those that may come, None where it grows too long."""
    matcher, draw, ids = matcher.copy(), random.Random(seed), []
    while len(ids) < MAX_TOKENS and not matcher.is_ended:
        words = matcher.allowed(tokenizer.vocab_size)
        assert words is not None, matcher.error
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        token_id = int(draw.choice(np.flatnonzero(bits).tolist()))
        if token_id in tokenizer.eos_token_ids:
            return tokenizer.decode(ids, skip_special_tokens=False)
        ids.append(token_id)
        matcher.consume(token_id)
    return tokenizer.decode(ids, skip_special_tokens=False) if matcher.is_ended else None


@pytest.mark.parametrize("family", CALLS, ids=lambda one: one.names[0])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_parsed_and_fit_their_schemas(
    family: CallFormat, tokenizers: Mapping[str, Tokenizer], parallel: bool
) -> None:
    tokenizer = tokenizers[family.names[0]]
    form = form_of(family, tokenizer, parallel=parallel)
    matcher = matcher_of(form, tokenizer)
    num_calls = 0
    for seed in range(NUM_ANSWERS):
        text = sampled(matcher, tokenizer, seed)
        if text is None:
            continue
        answer = assembled(form.parser(), [text])
        assert answer.tool_calls, text
        assert not answer.text.strip()
        assert parallel or len(answer.tool_calls) == 1
        for call in answer.tool_calls:
            arguments = json.loads(call.arguments)
            assert jsonschema_rs.is_valid(SCHEMAS[call.name], arguments), (text, arguments)
            num_calls += 1
    assert num_calls >= NUM_ANSWERS // 4


@pytest.mark.parametrize("family", CALLS, ids=lambda one: one.names[0])
def test_strict_calls_may_come_behind_text_and_fit(
    family: CallFormat, tokenizers: Mapping[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[family.names[0]]
    matcher = matcher_of(form_of(family, tokenizer, tools=STRICT, choice="auto"), tokenizer)

    def num_taken(text: str) -> tuple[int, int]:
        ids = tokenizer.encode(text.removesuffix("<|call|>"), add_special_tokens=False)
        return matcher._matcher.deep_copy().try_consume_tokens(ids), len(ids)

    harmony = family.names[0] == "openai"
    plain = "<|channel|>final<|message|>Hello, [x] there." if harmony else "Hello, [x] there.\n"
    assert num_taken(plain)[0] == num_taken(plain)[1]
    for example in EXAMPLES:
        calls = [arguments for _, arguments in example.calls]
        if CALLS_BY_NAME[example.parser] is not family or not calls or not _is_written_usually(example):
            continue
        taken, all_of_it = num_taken(example.text)
        assert taken == all_of_it, example.text
        wrong = example.text.replace("Paris", "\u0393" * 30)
        assert num_taken(wrong)[0] < num_taken(wrong)[1]


@pytest.mark.parametrize("family", CALLS, ids=lambda one: one.names[0])
def test_an_answer_calls_tools_or_has_its_form(
    family: CallFormat, tokenizers: Mapping[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[family.names[0]]
    form = form_of(family, tokenizer, choice="auto")
    if not family.differs_from_json:
        with pytest.raises(InvalidRequestError, match="can't be told from"):
            form.with_text_form(Grammar("json_schema", PLACE))
        return
    form = form.with_text_form(Grammar("json_schema", PLACE))
    matcher = matcher_of(form, tokenizer)
    num_whole = 0
    for seed in range(NUM_ANSWERS):
        text = sampled(matcher, tokenizer, seed)
        if text is None:
            continue
        answer = assembled(form.parser(), [text])
        for call in answer.tool_calls:
            assert jsonschema_rs.is_valid(SCHEMAS[call.name], json.loads(call.arguments)), text
        if answer.tool_calls:
            assert not answer.text.strip(), text
        else:
            assert jsonschema_rs.is_valid(PLACE, json.loads(answer.text)), text
        num_whole += 1
    assert num_whole > 0

    def is_begun(text: str) -> bool:
        ids = tokenizer.encode(text, add_special_tokens=False)
        taken: int = matcher._matcher.deep_copy().try_consume_tokens(ids)
        return taken == len(ids)

    assert is_begun('{"place": "Rome"}')
    assert not is_begun("Rome")
    for example in EXAMPLES:
        if CALLS_BY_NAME[example.parser] is family and _is_written_usually(example):
            assert is_begun(example.text) or not example.text.startswith(family.triggers), example.text


@pytest.mark.parametrize("grammar", [Grammar("regex", "a+"), Grammar("json_schema", {"type": "array"})])
def test_other_forms_have_no_calls_beside(tokenizers: Mapping[str, Tokenizer], grammar: Grammar) -> None:
    form = form_of(CALLS_BY_NAME["hermes"], tokenizers["hermes"], choice="auto")
    with pytest.raises(InvalidRequestError, match="must be a JSON schema of an object"):
        form.with_text_form(grammar)


def _is_written_usually(example: Example) -> bool:
    """As templates show it: the grammar lets nothing else through."""
    return example.text in USUAL


USUAL = {
    example.text
    for example in EXAMPLES
    if example.calls
    and example.calls[0] == ("get_weather", {"city": "Paris", "days": 3})
    and len(example.calls) == 1
    and example.reasoning_parser == "none"
    and not any(
        word in example.text for word in ('"id"', '\\"city\\"', "functools", "[TOOL_CALLS] [", "'Paris'")
    )
    and not example.text.startswith("[TOOL_CALLS]get_weather{")
    and not (example.parser == "mistral" and "[ARGS]" in example.text)
}


def test_there_are_usual_examples() -> None:
    assert len({example.parser for example in EXAMPLES if example.text in USUAL}) >= 8


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45", "gemma4"])
def test_what_text_without_quotes_cant_follow_is_refused(
    name: str, tokenizers: Mapping[str, Tokenizer]
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^b+$"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    form = form_of(CALLS_BY_NAME[name], tokenizers[name], tools=tools)
    with pytest.raises(InvalidRequestError, match="pattern"):
        matcher_of(form, tokenizers[name])


def test_left_to_the_model_there_is_no_grammar(tokenizers: Mapping[str, Tokenizer]) -> None:
    hermes = CALLS_BY_NAME["hermes"]
    for choice in ("auto", "none"):
        assert not form_of(hermes, tokenizers["hermes"], choice=choice).forces_calls
