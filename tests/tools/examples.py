"""Answers as families write them, each with what it says; forms are those of model cards and templates."""

# ruff: noqa: E501  (an answer is one line)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loraserve.tools.tool import ToolOptions

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a place",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where", "maxLength": 24},
                "days": {"type": "integer", "minimum": 0, "maximum": 99},
                "units": {"type": "string", "enum": ["c", "f"]},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ORDER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "place_order",
        "parameters": {
            "type": "object",
            "properties": {
                "items": {"type": "array", "items": {"type": "string", "maxLength": 16}, "maxItems": 3},
                "address": {
                    "type": "object",
                    "properties": {
                        "street": {"type": "string", "maxLength": 16},
                        "zip": {"type": ["integer", "null"]},
                    },
                    "additionalProperties": False,
                },
                "note": {"anyOf": [{"type": "string", "maxLength": 16}, {"type": "null"}]},
                "express": {"type": "boolean"},
                "price": {"type": "number", "minimum": 0, "maximum": 1000},
            },
            "required": ["items"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, ORDER, TIME]
OPTIONS = ToolOptions.from_fields(TOOLS)

Calls = list[tuple[str, Any]]


@dataclass(frozen=True)
class Example:
    """An answer, the calls in it as (name, arguments), and its content. Arguments as text are broken JSON."""

    parser: str
    text: str
    calls: Calls = field(default_factory=list)
    content: str = ""
    reasoning: str = ""
    reasoning_parser: str = "none"


PARIS = {"city": "Paris", "days": 3}
BOOK = {"items": ["a [book]", 'a "pen"'], "address": {"street": "É 1 <b>", "zip": None}, "express": True}
BOOK_JSON = '{"items": ["a [book]", "a \\"pen\\""], "address": {"street": "\\u00c9 1 <b>", "zip": null}, "express": true}'


def deepseek(name: str) -> str:
    return f"<\uff5ctool\u2581{name}\uff5c>".replace(" ", "\u2581")


BEGIN, END = deepseek("calls begin"), deepseek("calls end")
CALL, CALLED, SEP = deepseek("call begin"), deepseek("call end"), deepseek("sep")

EXAMPLES = [
    # Hermes and Qwen
    Example(
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
        [("get_weather", PARIS)],
    ),
    Example(
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n'
        f'</tool_call>\n<tool_call>\n{{"name": "place_order", "arguments": {BOOK_JSON}}}\n</tool_call>',
        [("get_weather", PARIS), ("place_order", BOOK)],
        "Let me look.\n",
    ),
    Example(
        "hermes",
        '<tool_call>{"arguments": {"city": "Paris", "days": 3}, "id": 7, "name": "get_weather"}</tool_call>',
        [("get_weather", PARIS)],
    ),
    Example("hermes", '<tool_call>{"name": "now"}</tool_call> Done.', [("now", {})], " Done."),
    Example(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 3}"}</tool_call>',
        [("get_weather", PARIS)],
    ),
    Example("hermes", '<tool_call>{"name": "unheard_of", "arguments": {}}</tool_call>', [("unheard_of", {})]),
    Example(
        "hermes", "Two < three, and a <tool_ is no call.\n\n", [], "Two < three, and a <tool_ is no call.\n\n"
    ),
    Example("hermes", "<tool_call>\nnot JSON\n</tool_call>", [], "<tool_call>\nnot JSON\n</tool_call>"),
    Example(
        "hermes",
        '<tool_call>\n{"nom": "get_weather"}\n</tool_call>',
        [],
        '<tool_call>\n{"nom": "get_weather"}\n</tool_call>',
    ),
    Example(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
        [("get_weather", '{"city": "Pa')],
    ),
    Example(
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": oh no! }}</tool_call>x',
        [("get_weather", '{"city": oh no! }}')],
        "x",
    ),
    # Llama 3
    Example(
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
        [("get_weather", PARIS)],
    ),
    Example(
        "llama3_json",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {{"city": "Paris", "days": 3}}}}; {{"name": "place_order", "parameters": {BOOK_JSON}}}',
        [("get_weather", PARIS), ("place_order", BOOK)],
    ),
    Example(
        "llama3_json", '{"name": "somebody", "parameters": {}}', [], '{"name": "somebody", "parameters": {}}'
    ),
    Example("llama3_json", '{"answer": 42}', [], '{"answer": 42}'),
    Example("llama3_json", "It is {sunny}.", [], "It is {sunny}."),
    Example("llama3_json", '<|python_start|>{"name": "now", "parameters": {}}<|python_end|>', [("now", {})]),
    # Mistral
    Example(
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
        [("get_weather", PARIS)],
    ),
    Example(
        "mistral",
        f'Well.[TOOL_CALLS][{{"name": "get_weather", "arguments": {{"city": "Paris", "days": 3}}, "id": "123456789"}}, {{"name": "place_order", "arguments": {BOOK_JSON}}}]',
        [("get_weather", PARIS), ("place_order", BOOK)],
        "Well.",
    ),
    Example(
        "mistral",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}',
        [("get_weather", PARIS), ("now", {})],
    ),
    Example("mistral_named", '[TOOL_CALLS]get_weather{"city": "Paris", "days": 3}', [("get_weather", PARIS)]),
    Example("mistral", "[TOOL_CALLS] none", [], "[TOOL_CALLS] none"),
    # Granite, Phi
    Example(
        "granite",
        f'<|tool_call|>[{{"name": "get_weather", "arguments": {{"city": "Paris", "days": 3}}}}, {{"name": "place_order", "arguments": {BOOK_JSON}}}]',
        [("get_weather", PARIS), ("place_order", BOOK)],
    ),
    Example("granite", '<tool_call>[{"name": "now", "arguments": {}}]', [("now", {})]),
    Example(
        "phi4_mini_json",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]<|/tool_call|>',
        [("get_weather", PARIS)],
    ),
    Example(
        "phi4_mini_json",
        'functools[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
        [("get_weather", PARIS)],
    ),
    Example("phi4_mini_json", "Python has functools, too.", [], "Python has functools, too."),
    # Qwen3-Coder
    Example(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        [("get_weather", PARIS)],
    ),
    Example(
        "qwen3_coder",
        'Hm.\n<tool_call>\n<function=place_order>\n<parameter=items>\n["a [book]", "a \\"pen\\""]\n</parameter>\n'
        '<parameter=address>\n{"street": "É 1 <b>", "zip": null}\n</parameter>\n<parameter=express>\nTrue\n</parameter>\n'
        '</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=city>\ntwo\n"lines" </b>\n</parameter>\n</function>\n</tool_call>',
        [("place_order", BOOK), ("get_weather", {"city": 'two\n"lines" </b>'})],
        "Hm.\n",
    ),
    Example("qwen3_coder", "<function=now>\n</function>", [("now", {})]),
    Example(
        "qwen3_coder",
        "<tool_call>\n<function=place_order>\n<parameter=note>\nnull\n</parameter>\n<parameter=price>\n1.5\n</parameter>\n</function>\n</tool_call>",
        [("place_order", {"note": None, "price": 1.5})],
    ),
    Example(
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar",
        [("get_weather", '{"city": "Par"')],
    ),
    Example("qwen3_coder", "<tool_call>\nnothing", [], "<tool_call>\nnothing"),
    # GLM
    Example(
        "glm45",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        [("get_weather", PARIS)],
    ),
    Example(
        "glm45",
        'So.<tool_call>place_order\n<arg_key>items</arg_key>\n<arg_value>["a [book]", "a \\"pen\\""]</arg_value>\n<arg_key>address</arg_key>'
        '<arg_value>{"street": "É 1 <b>", "zip": null}</arg_value><arg_key>express</arg_key><arg_value>true</arg_value></tool_call><tool_call>now\n</tool_call>',
        [("place_order", BOOK), ("now", {})],
        "So.",
    ),
    # Pythonic
    Example("pythonic", "[get_weather(city='Paris', days=3)]", [("get_weather", PARIS)]),
    Example(
        "pythonic",
        "<|python_start|>[get_weather(city='Paris', days=3), place_order(items=['a [book]', \"a \\\"pen\\\"\",], address={'street': '\\xc9 1 <b>', 'zip': None}, express=True), now()]<|python_end|>",
        [("get_weather", PARIS), ("place_order", BOOK), ("now", {})],
    ),
    Example("pythonic", "[1, 2, 3]", [], "[1, 2, 3]"),
    Example("pythonic", "[unheard_of(a=1)]", [], "[unheard_of(a=1)]"),
    Example("pythonic", "No (call).", [], "No (call)."),
    Example("pythonic", "[get_weather(city='Par", [("get_weather", '{"city": "Par')]),
    # Gemma
    Example(
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>',
        [("get_weather", PARIS)],
    ),
    Example(
        "gemma4",
        'Yes.<|tool_call>call:place_order{items:[<|"|>a [book]<|"|>,<|"|>a "pen"<|"|>],address:{street:<|"|>É 1 <b><|"|>,zip:null},express:true}<tool_call|><|tool_call>call:now{}<tool_call|>',
        [("place_order", BOOK), ("now", {})],
        "Yes.",
    ),
    Example(
        "functiongemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>",
        [("get_weather", PARIS)],
    ),
    # DeepSeek
    Example(
        "deepseek_v3",
        f'I look.{BEGIN}{CALL}function{SEP}get_weather\n```json\n{{"city": "Paris", "days": 3}}\n```{CALLED}\n{CALL}function{SEP}place_order\n```json\n{BOOK_JSON}\n```{CALLED}{END}',
        [("get_weather", PARIS), ("place_order", BOOK)],
        "I look.",
    ),
    Example(
        "deepseek_v31",
        f'{BEGIN}{CALL}get_weather{SEP}{{"city": "Paris", "days": 3}}{CALLED}{CALL}place_order{SEP}{BOOK_JSON}{CALLED}{END}',
        [("get_weather", PARIS), ("place_order", BOOK)],
    ),
    # gpt-oss
    Example(
        "openai",
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris", "days": 3}<|call|>',
        [("get_weather", PARIS)],
        reasoning="Need the weather.",
    ),
    Example(
        "openai",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Hello <b>there</b>.",
        [],
        "Hello <b>there</b>.",
        "Easy.",
    ),
    Example(
        "openai",
        "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant to=functions.now<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        [("now", {})],
        "I will look.",
    ),
    # Reasoning before calls
    Example(
        "hermes",
        '<think>\nWhere? <tool_call> is for that.\n\nParis.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
        [("get_weather", PARIS)],
        reasoning="Where? <tool_call> is for that.\n\nParis.",
        reasoning_parser="qwen3",
    ),
    Example("hermes", "<think>\n\n</think>\n\nHello.\n", [], "Hello.\n", reasoning_parser="qwen3"),
    Example("hermes", "<think>no end", [], "", "no end", "qwen3"),
    Example("hermes", "\n No <think>ing</think>.", [], "\n No <think>ing</think>.", "", "qwen3"),
    Example(
        "granite", "Here is my thought process: hm.\nHere is my response: yes.", [], "yes.", "hm.", "granite"
    ),
    Example("mistral", "[THINK]hm[/THINK]yes", [], "yes", "hm", "mistral"),
    Example("gemma4", "<|channel>thought\nhm\n<channel|>yes", [], "yes", "hm", "gemma4"),
]
