"""Calls, reasoning and its budget in Python, by adapters' manifests, and behind special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from loraserve import LLM, SamplingParams
from loraserve.adapters.manifest import AdapterManifest
from loraserve.errors import AdapterFormatError, InvalidRequestError
from loraserve.request import ChatOptions
from loraserve.sampling.grammar import Grammar
from loraserve.tools.tool import ToolOptions

from tests.tools.examples import EXAMPLES, PARIS, TOOLS, WEATHER
from tests.tools.models import SAY, let_models_say, make_family_model

ASK = [{"role": "user", "content": "Weather?"}]
GREEDY = SamplingParams(max_tokens=300, temperature=0.0)
TOKENS = ("<think>", "</think>", "[TOOL_CALLS]", "<tool_call>", "</tool_call>")
SCHEMA = WEATHER["function"]["parameters"]
SCHEMAS = {
    tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0}) for tool in TOOLS
}
HARMONY = (
    "{% if tools %}{{ tools }}{% endif %}{{ messages[-1].content }}<|start|>assistant"
    "{# <|channel|>analysis<|message|> … <|end|> #}"
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> Iterator[LLM]:
    path = make_family_model(tmp_path_factory.mktemp("qwen"), hf_smollm2_tokenizer, "qwen3", TOKENS)
    patch = pytest.MonkeyPatch()
    let_models_say(patch)
    with LLM(path, dtype="float32", memory="256MiB", max_model_len=2048, device="cpu") as llm:
        yield llm
    patch.undo()


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": SAY + text}]


def test_what_special_tokens_mark_is_found(llm: LLM) -> None:
    call = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}'
    text = f"<think>\nHm 🎉</think>\nSo 🎉<tool_call>\n{call}\n</tool_call>"
    (output,) = llm.chat(say(text), GREEDY, tools=TOOLS)
    assert (output.reasoning, output.text, output.finish_reason) == ("Hm 🎉", "So 🎉", "tool_calls")
    (found,) = output.tool_calls
    assert (found.name, json.loads(found.arguments)) == ("get_weather", PARIS)


def test_special_tokens_of_no_form_are_not_shown(llm: LLM) -> None:
    (output,) = llm.chat(say("a<tool_call>b"), GREEDY)
    assert output.text == "ab"


def test_a_thousand_sampled_calls_fit(llm: LLM) -> None:
    names = set()
    for seed in range(0, 1000, 100):
        params = SamplingParams(max_tokens=900, temperature=1.0, n=100, seed=seed)
        (output,) = llm.chat(
            ASK,
            params,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            chat_template_kwargs={"enable_thinking": False},
        )
        for one in output.completions:
            assert one.finish_reason == "tool_calls"
            (call,) = one.tool_calls
            names.add(call.name)
            assert jsonschema_rs.is_valid(SCHEMAS[call.name], json.loads(call.arguments))
    assert names == set(SCHEMAS)


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<|endoftext|>"])
def test_texts_of_special_tokens_are_forced_as_text_or_refused(llm: LLM, text: str) -> None:
    parameters = {"type": "object", "properties": {"x": {"const": text}}, "required": ["x"]}
    parameters["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    fields: Any = {"tools": tools, "tool_choice": "required"}
    params = SamplingParams(max_tokens=400, temperature=0.0)
    without_tokens = "{% if tools %}<|tool_call|>{% endif %}{{ messages[0].content }}"
    (output,) = llm.chat(ASK, params, chat_template=without_tokens, **fields)
    assert json.loads(output.tool_calls[0].arguments) == {"x": text}
    with pytest.raises(InvalidRequestError, match="text .* of a special token"):
        llm.chat(ASK, params, **fields)


def test_more_than_a_grammar_takes_is_refused(llm: LLM) -> None:
    properties = {f"{'p' * 50}{index}": {"type": "string"} for index in range(500)}
    tools = [
        {"type": "function", "function": {"name": f"f{index}", "parameters": {"properties": properties}}}
        for index in range(3)
    ]
    short = "{% if tools %}<tool_call> with arguments{% endif %}{{ messages[0].content }}"
    fields: Any = {"tools": tools, "tool_choice": "required", "chat_template": short}
    with pytest.raises(InvalidRequestError, match="can't be forced: .* limit is 65536"):
        llm.chat(ASK, SamplingParams(max_tokens=1), **fields)


def test_calls_go_back_into_a_chat_as_they_came(llm: LLM) -> None:
    call = {"name": "now", "arguments": '{"a": 1}'}
    chats = [
        [
            *ASK,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        ]
        for function in (call, {**call, "arguments": {"a": 1}})
    ]
    of_text, of_object = llm.chat(chats, SamplingParams(max_tokens=1))
    assert of_text.prompt_token_ids == of_object.prompt_token_ids
    for broken in ("{", "[1]", '{"a": NaN}'):  # as a model may write them, and an agent sends them back
        call = {"type": "function", "function": {"name": "now", "arguments": broken}}
        as_text = {"type": "function", "function": {"name": "now", "arguments": {"INVALID_JSON": broken}}}
        chats = [[*ASK, {"role": "assistant", "content": "", "tool_calls": [one]}] for one in (call, as_text)]
        of_text, of_object = llm.chat(chats, SamplingParams(max_tokens=1))
        assert of_text.prompt_token_ids == of_object.prompt_token_ids


def begins_with(llm: LLM, text: str) -> dict[int, float]:
    """A bias for the token of this text."""
    return {llm._engine.runner.model.tokenizer.id_of(text): 100.0}  # type: ignore[dict-item]


def test_strict_calls_fit_wherever_they_begin(llm: LLM) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    params = SamplingParams(
        max_tokens=700, temperature=1.0, n=24, seed=3, logit_bias=begins_with(llm, "<tool_call>")
    )
    (output,) = llm.chat(ASK, params, tools=[strict], parallel_tool_calls=False)
    end = llm._engine.runner.model.tokenizer.id_of("</tool_call>")
    calls = [one.tool_calls[0] for one in output.completions if end in one.token_ids]
    assert len(calls) >= 20
    assert all(jsonschema_rs.is_valid(SCHEMA, json.loads(call.arguments)) for call in calls)


def test_reasoning_comes_before_what_is_forced(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=300, temperature=1.0, n=8, seed=3, logit_bias=begins_with(llm, "<think>")
    )
    (output,) = llm.chat(
        ASK,
        params,
        tools=[WEATHER],
        tool_choice="required",
        thinking_token_budget=5,
        parallel_tool_calls=False,
    )
    whole = [one for one in output.completions if one.finish_reason == "tool_calls"]
    assert len(whole) >= 5
    think, end = (llm._engine.runner.model.tokenizer.id_of(text) for text in ("<think>", "</think>"))
    for one in whole:
        assert one.token_ids[0] == think
        assert one.token_ids.index(end) == 6
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(one.tool_calls[0].arguments))


def test_guesses_change_no_forced_answer(llm: LLM, tmp_path: Path, hf_smollm2_tokenizer: Any) -> None:
    path = make_family_model(tmp_path / "model", hf_smollm2_tokenizer, "qwen3", TOKENS)
    fields: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    params = SamplingParams(
        max_tokens=300, temperature=1.0, n=4, seed=3, logit_bias=begins_with(llm, "<think>")
    )
    settings: Any = {"dtype": "float32", "memory": "256MiB", "max_model_len": 2048, "device": "cpu"}
    with LLM(path, speculate="ngram", **settings) as guessing:
        (guessed,) = guessing.chat(ASK, params, thinking_token_budget=8, **fields)
    (usual,) = llm.chat(ASK, params, thinking_token_budget=8, **fields)
    assert [one.token_ids for one in guessed.completions] == [one.token_ids for one in usual.completions]
    assert any(one.usage and one.usage.accepted_prediction_tokens for one in guessed.completions)


def test_a_form_begins_behind_the_reasoning(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=60,
        temperature=1.0,
        seed=3,
        grammar=Grammar("choice", ["yes", "no"]),
        logit_bias=begins_with(llm, "<think>"),
    )
    (output,) = llm.chat(ASK, params, thinking_token_budget=4)
    assert output.text in ("yes", "no")
    assert len(output.token_ids) >= 6


def test_a_budget_of_none_ends_at_once_and_none_sets_no_limit(llm: LLM) -> None:
    bias = SamplingParams(max_tokens=20, temperature=0.0, logit_bias=begins_with(llm, "<think>"))
    end = llm._engine.runner.model.tokenizer.id_of("</think>")
    (output,) = llm.chat(ASK, bias, thinking_token_budget=0)
    assert output.token_ids[1] == end
    (output,) = llm.chat(ASK, bias)
    assert end not in output.token_ids


def test_a_prompt_that_closes_the_reasoning_gets_content(llm: LLM) -> None:
    (output,) = llm.chat(say("Hello."), GREEDY, chat_template_kwargs={"enable_thinking": False})
    assert (output.text, output.reasoning) == ("Hello.", "")


def test_what_an_adapter_says_of_its_form_counts(tmp_path: Path, hf_smollm2_tokenizer: Any) -> None:
    from transformers import LlamaForCausalLM  # noqa: PLC0415  slow to import

    from tests.e2e.oracle import AdapterSpec, make_adapter  # noqa: PLC0415  slow to import

    path = make_family_model(tmp_path / "model", hf_smollm2_tokenizer, "qwen3", TOKENS)
    model = LlamaForCausalLM.from_pretrained(path)
    adapter = str(make_adapter(model, AdapterSpec("a", 4, ["q_proj"], std=0.1), tmp_path, 1))
    manifest = AdapterManifest.from_fields({"tool_parser": "mistral", "reasoning_parser": "none"}, "test")
    patch = pytest.MonkeyPatch()
    let_models_say(patch)
    example = next(one for one in EXAMPLES if one.parser == "mistral" and "[ARGS]" not in one.text)
    text = "<think>x</think>" + example.text
    with LLM(
        path,
        {"a": adapter},
        manifests={"a": manifest},
        dtype="float32",
        memory="256MiB",
        max_model_len=2048,
        device="cpu",
    ) as llm:
        of_adapter, of_base = llm.chat([say(text)] * 2, GREEDY, ["a", None], tools=TOOLS)
    patch.undo()
    assert of_adapter.text == "x"  # with tags that are special tokens, which no form shows
    assert [call.name for call in of_adapter.tool_calls] == [name for name, _ in example.calls]
    assert of_base.reasoning == "x"
    assert not of_base.tool_calls


def test_wrong_names_in_a_manifest_are_refused() -> None:
    with pytest.raises(AdapterFormatError, match="hermes"):
        AdapterManifest.from_fields({"tool_parser": "hermess"}, "test")
    manifest = AdapterManifest.from_fields({"tool_parser": "hermes", "reasoning_parser": "qwen3"}, "test")
    assert AdapterManifest.from_fields(manifest.to_fields(), "again") == manifest


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": TOOLS, "chat_template": "{{ messages[0].content }}"}, "no place for them"),
        ({"tools": TOOLS, "chat_template": "{{ tools }}{{ messages[0].content }}"}, "--tool-parser"),
        ({"chat_template": "{{ messages[0].content }}", "thinking_token_budget": 3}, "--reasoning-parser"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ],
)
def test_what_the_template_cant_do_is_told(llm: LLM, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        llm.chat(ASK, GREEDY, **fields)


def test_harmony_has_reasoning_and_calls_in_channels(llm: LLM) -> None:
    example = next(one for one in EXAMPLES if one.parser == "openai" and one.calls and one.reasoning)
    (output,) = llm.chat(say(example.text), GREEDY, tools=TOOLS, chat_template=HARMONY)
    assert (output.text, output.reasoning) == ("", example.reasoning)
    assert [(call.name, json.loads(call.arguments)) for call in output.tool_calls] == example.calls
    final = next(one for one in EXAMPLES if one.parser == "openai" and not one.calls)
    (output,) = llm.chat(say(final.text), GREEDY, chat_template=HARMONY)
    assert (output.text, output.reasoning) == (final.content, final.reasoning)
    (output,) = llm.chat(say(example.text), GREEDY, chat_template=HARMONY)
    assert (output.tool_calls, output.finish_reason) == ([], "stop")


def test_harmony_forms_stand_in_the_final_channel(llm: LLM) -> None:
    params = SamplingParams(max_tokens=90, seed=5, grammar=Grammar("choice", ["yes", "no"]))
    (output,) = llm.chat(ASK, params, chat_template=HARMONY, thinking_token_budget=4)
    final = "<|channel|>final<|message|>"
    text = llm._engine.runner.model.tokenizer.decode(output.token_ids, skip_special_tokens=False)
    assert text.partition(final)[2] in ("yes", "no")
    assert output.text.endswith(("yes", "no"))
    assert "<|" not in output.text


def test_an_answer_that_is_not_parsed_has_no_tools() -> None:
    with pytest.raises(InvalidRequestError, match="parsed"):
        ChatOptions(tools=ToolOptions.from_fields(TOOLS), is_parsed=False)
