import math
from dataclasses import fields
from typing import Any

import pytest
from loraserve.errors import InvalidRequestError
from loraserve.request import ChatOptions, Delta, GenerateRequest, RequestTiming, TokenLogprob, Usage
from loraserve.sampling.grammar import Grammar
from loraserve.sampling_params import SamplingParams
from loraserve.tools.call import ToolCallDelta
from loraserve.tools.tool import Tool, ToolOptions
from loraserve.v1 import loraserve_pb2 as pb
from loraserve.wire.messages import delta_from_wire, delta_to_wire, request_from_wire, request_to_wire

REQUESTS = [
    GenerateRequest(prompt="x", params=SamplingParams(max_tokens=0, prompt_logprobs=3)),
    GenerateRequest(prompt="hello"),
    GenerateRequest(prompt=""),
    GenerateRequest(prompt=[1, 2, 3], adapter="sql"),
    GenerateRequest(prompt=[]),
    GenerateRequest(messages=[{"role": "user", "content": "hi"}], adapter={"a": 0.5, "b": -2.0}),
    GenerateRequest(
        prompt="x",
        params=SamplingParams(
            max_tokens=7,
            temperature=0.7,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.2,
            frequency_penalty=-0.3,
            seed=-4,
            stop=("a", "b"),
            stop_token_ids=(8, 9),
            ignore_eos=True,
            min_tokens=2,
            logprobs=0,
            n=3,
            typical_p=0.8,
            logit_bias={5: -100.0, 7: 1.5},
        ),
        deadline_s=2.5,
        truncate=10,
    ),
    GenerateRequest(prompt="x", params=SamplingParams(max_tokens=None)),
    GenerateRequest(prompt="x", user="ann"),
    GenerateRequest(prompt="x", suffix="y"),
    GenerateRequest(prompt="x", suffix="", prediction="y"),
    GenerateRequest(prompt="x", params=SamplingParams(grammar=Grammar("json"))),
    GenerateRequest(prompt="x", params=SamplingParams(grammar=Grammar("json_schema", {"type": "string"}))),
    GenerateRequest(prompt="x", params=SamplingParams(grammar=Grammar("regex", "[a-z]+"))),
    GenerateRequest(prompt="x", params=SamplingParams(grammar=Grammar("lark", 'start: "a"'))),
    GenerateRequest(prompt="x", params=SamplingParams(grammar=Grammar("choice", ["a", "b"]))),
    GenerateRequest(
        messages=[
            {"role": "user", "content": "weather?", "name": "anna"},
            {
                "role": "assistant",
                "content": "",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}},
                    {"type": "function", "function": {"name": "time", "arguments": ""}},
                ],
            },
            {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        ],
        chat=ChatOptions(
            template_kwargs={"enable_thinking": False},
            tools=ToolOptions.from_fields(
                [
                    Tool(
                        name="weather",
                        description="of a city",
                        parameters={"type": "object", "properties": {"a": {"type": "integer"}}},
                        strict=True,
                        returns={"type": "string"},
                    ),
                    Tool(name="time"),
                ],
                "auto",
                parallel=False,
            ),
            thinking_budget=0,
        ),
    ),
    *(
        GenerateRequest(
            messages=[{"role": "user", "content": "x"}],
            chat=ChatOptions(tools=ToolOptions.from_fields([Tool(name="a"), Tool(name="b")], choice)),
        )
        for choice in (
            "none",
            "required",
            {"type": "function", "function": {"name": "b"}},
            {"type": "allowed_tools", "mode": "auto", "tools": ["a"]},
        )
    ),
]


def chat_message(**fields: Any) -> pb.GenerateRequest:
    """A chat with these fields."""
    return pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")], **fields)
    )


DELTAS = [
    Delta(0, "é", [5], None, None, None),
    Delta(2, "", [], None, "abort", Usage(3, 0, 1), RequestTiming(0.5, None, 0.75, False)),
    Delta(0, "", [4], None, "stop", Usage(3, 1, 1), RequestTiming(0.5, 0.125, 0.75, True)),
    Delta(0, "", [4], None, "stop", Usage(3, 9, 1, 4, 2, 5), stop_string="STOP"),
    Delta(
        1,
        "a",
        [5, 6],
        [TokenLogprob(5, -0.5, [(5, -0.5), (7, -1.0)]), TokenLogprob(6, -2.0, [])],
        "stop",
        None,
    ),
    Delta(0, "", [5], None, None, None, reasoning="hm", tool_calls=(ToolCallDelta(0, "call_1", "now", "{"),)),
    Delta(0, "", [7], None, None, None, prompt_logprobs=[None, TokenLogprob(5, -0.5, [(7, -0.25)])]),
    Delta(0, "", [6], None, "tool_calls", None, tool_calls=(ToolCallDelta(0, arguments="}"),)),
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_survives_the_wire(request_: GenerateRequest) -> None:
    assert request_from_wire(request_to_wire(request_)) == request_


@pytest.mark.parametrize("delta", DELTAS)
def test_a_delta_survives_the_wire(delta: Delta) -> None:
    assert delta_from_wire(delta_to_wire(delta)) == delta


def test_fields_left_out_take_the_defaults_of_sampling_params() -> None:
    assert request_from_wire(pb.GenerateRequest(text="x")).params == SamplingParams()


def test_an_explicit_zero_is_not_taken_for_a_field_left_out() -> None:
    message = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=0.0))
    assert request_from_wire(message).params.temperature == 0.0


def test_what_was_given_and_nothing_else_is_given_on_the_other_side() -> None:
    sent = GenerateRequest(prompt="x", params=SamplingParams(temperature=1.0, stop=("a",)))
    assert request_from_wire(request_to_wire(sent)).params.given == {"temperature", "stop"}
    filled = SamplingParams(top_k=3).with_defaults({"max_tokens": 7})
    received = request_from_wire(request_to_wire(GenerateRequest(prompt="x", params=filled))).params
    assert received == filled


def test_the_proto_has_every_sampling_parameter() -> None:
    in_proto = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert in_proto == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.GenerateRequest(), "the request has no prompt"),
        (pb.GenerateRequest(text="x", adapter="a", adapters={"b": 1.0}), "both adapter and adapters are set"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_p=0)), "top_p is 0"),
        (
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(grammar=pb.Grammar())),
            "grammar has no form",
        ),
        (
            chat_message(tools=[pb.Tool(name="a", parameters_json="{")]),
            "parameters_json of tool 'a': not JSON",
        ),
        (chat_message(tools=[pb.Tool(name="a", parameters_json='{"a": NaN}')]), "NaN is no JSON"),
        (chat_message(tools=[pb.Tool(name="a", parameters_json="[]")]), "must be a JSON schema"),
        (chat_message(tools=[pb.Tool(name="a b")]), "name of a tool"),
        (chat_message(tools=[pb.Tool(name="a"), pb.Tool(name="a")]), "two tools"),
        (chat_message(tools=[pb.Tool(name="a")] * 129), "limit is 128"),
        (chat_message(tools=[pb.Tool(name="a", parameters_json=" " * 2**20)]), "limit is 262144"),
        (chat_message(tools=[pb.Tool(name="a")], allowed_tools=["b"]), "none of the tools"),
        (chat_message(tool_mode=pb.TOOL_MODE_REQUIRED), "there are no tools"),
        (
            chat_message(tools=[pb.Tool(name="a")], allowed_tools=["a"], tool_mode=pb.TOOL_MODE_NONE),
            "give one of them",
        ),
        (chat_message(tool_mode=9), "tool_mode is 9"),  # type: ignore[arg-type]
        (chat_message(template_kwargs_json="{"), "template_kwargs_json: not JSON"),
        (
            pb.GenerateRequest(
                chat=pb.ChatMessages(
                    messages=[
                        pb.ChatMessage(tool_calls=[pb.ToolCall(name="a", arguments_json=" " * 2**20 + "{}")])
                    ]
                )
            ),
            "limit is 1048576",
        ),
    ],
)
def test_a_wrong_message_is_refused(message: pb.GenerateRequest, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        request_from_wire(message)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"prompt": [-1]},
        {"prompt": [2**40]},
        {"prompt": ["x"]},
        {"prompt": "x", "adapter": {"a": "heavy"}},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"nam": "x"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": ["x"]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"a": math.nan}}}]}]},
    ],
)
def test_a_request_the_wire_cannot_carry_is_refused_before_it_is_sent(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        request_to_wire(GenerateRequest(**arguments))
