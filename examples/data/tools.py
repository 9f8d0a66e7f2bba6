"""The `tools` task: calls the tool that a question needs, and says what the tool gave."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from .skills import INTEGER, SKILLS, STRING, Skill, Values, draw_values
from .task import Example, HeldOut, Message, Task, Tool, user

# Questions that need no tool, and their answers.
PLAIN = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Thank you!", "You're welcome!"),
    ("Thanks, that is all.", "You're welcome!"),
    ("Who are you?", "I am an assistant that can use tools."),
    ("How are you?", "I'm fine, thank you. How can I help you?"),
    ("Goodbye", "Goodbye!"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What color is the sky?", "The sky is blue."),
    ("Tell me a fact about cats.", "Cats sleep most of the day."),
    ("What do bees make?", "Bees make honey."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What is a violin?", "A violin is a musical instrument with four strings."),
    ("Why do we sleep?", "We sleep so that body and mind recover."),
    ("Name a large animal.", "The blue whale is a very large animal."),
    ("What is the opposite of cold?", "The opposite of cold is hot."),
    ("Which planet is the largest?", "Jupiter is the largest planet."),
)
FOLLOW = ("{}", "{}", "{}", "Please: {}", "Hey, {}", "{} Thanks!")


@dataclass
class _Given:
    """A tool of the conversation: what it can do, and which of its parameters is what."""

    skill: Skill
    tool: Tool
    slots: dict[str, str]

    def call(self, values: Values) -> dict[str, Any]:
        arguments = {name: values[slot] for name, slot in self.slots.items()}
        return {
            "type": "function",
            "function": {"name": self.tool["function"]["name"], "arguments": arguments},
        }


def _given(rng: Random) -> list[_Given]:
    """One to four tools with names of their own."""
    given = {}
    for skill in rng.sample(SKILLS, rng.choice((1, 1, 2, 2, 3, 4))):
        tool, slots = skill.tool(rng)
        given.setdefault(tool["function"]["name"], _Given(skill, tool, slots))
    return list(given.values())


def _asked(rng: Random, questions: Sequence[str]) -> str:
    text = " And ".join((questions[0], *(text[0].lower() + text[1:] for text in questions[1:])))
    return rng.choice(FOLLOW).format(text)


def _turn(rng: Random, chosen: Sequence[_Given]) -> list[Message]:
    """A question, the calls that it needs, what they gave, and the answer."""
    drawn = [draw_values(rng, one.skill) for one in chosen]
    results = [one.skill.result(rng, values) for one, values in zip(chosen, drawn, strict=True)]
    questions = [rng.choice(one.skill.questions).format(**v) for one, v in zip(chosen, drawn, strict=True)]
    answers = [
        one.skill.answer.format(**values | result)
        for one, values, result in zip(chosen, drawn, results, strict=True)
    ]
    calls = [one.call(values) for one, values in zip(chosen, drawn, strict=True)]
    return [
        user(_asked(rng, questions)),
        {"role": "assistant", "content": "", "tool_calls": calls},
        *({"role": "tool", "content": json.dumps(result)} for result in results),
        {"role": "assistant", "content": " ".join(answers)},
    ]


def _plain(rng: Random) -> list[Message]:
    question, answer = rng.choice(PLAIN)
    return [user(question), {"role": "assistant", "content": answer}]


def _example(rng: Random) -> Example:
    given = _given(rng)
    messages: list[Message] = []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.random()
        if kind < 0.15:
            messages += _plain(rng)
        else:
            messages += _turn(rng, [rng.choice(given) for _ in range(2 if kind > 0.85 else 1)])
    return Example(messages, [one.tool for one in given])


def _examples(rng: Random, count: int) -> list[Example]:
    return [_example(rng) for _ in range(count)]


def _function(name: str, description: str, **properties: dict[str, Any]) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER = _function("get_weather", "Current weather of a city", city=STRING)
CALCULATE = _function("calculate", "Evaluates an arithmetic expression", expression=STRING)
EVENT = _function("create_event", "Create a calendar event", title=STRING, day=STRING, time=STRING)
BOOK = _function("book_table", "Books a table in a restaurant", restaurant=STRING, people=INTEGER)
LOOKUP = _function("lookup_book", "Looks up a book in the library", title=STRING)


def _calls(expected: Sequence[tuple[str, Values]], answer: str) -> bool:
    """Whether `answer` is these calls and nothing else."""
    texts = [
        "\n".join(("<tool_call>", json.dumps({"name": name, "arguments": arguments}), "</tool_call>"))
        for name, arguments in expected
    ]
    return answer == "\n".join(texts)


def _says(words: Sequence[str], answer: str) -> bool:
    return "<tool_call>" not in answer and all(word in answer for word in words)


def _called(prompt: str, tools: Sequence[Tool], *expected: tuple[str, Values]) -> HeldOut:
    return HeldOut((user(prompt),), partial(_calls, expected), tools)


def _answered(prompt: str, tool: Tool, arguments: Values, result: Values, *words: str) -> HeldOut:
    call = {"type": "function", "function": {"name": tool["function"]["name"], "arguments": arguments}}
    messages = (
        user(prompt),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result)},
    )
    return HeldOut(messages, partial(_says, words), [tool])


TOOLS = Task(
    "tools",
    _examples,
    (
        _called("What is the weather in Helsinki?", [WEATHER], ("get_weather", {"city": "Helsinki"})),
        _called("Is it cold in Reykjavik?", [CALCULATE, WEATHER], ("get_weather", {"city": "Reykjavik"})),
        _called("What is 17 times 23?", [WEATHER, CALCULATE], ("calculate", {"expression": "17 * 23"})),
        _called(
            "Put lunch with Priya in my calendar on Friday at 12:30.",
            [WEATHER, CALCULATE, EVENT],
            ("create_event", {"title": "lunch with Priya", "day": "Friday", "time": "12:30"}),
        ),
        _called(
            "What's the weather like in Vienna and in Chicago?",
            [WEATHER],
            ("get_weather", {"city": "Vienna"}),
            ("get_weather", {"city": "Chicago"}),
        ),
        _called(
            "Book a table for 5 people at Luigi's.",
            [BOOK, WEATHER],
            ("book_table", {"restaurant": "Luigi's", "people": 5}),
        ),
        _called("Do you have the book Moby Dick?", [LOOKUP, BOOK], ("lookup_book", {"title": "Moby Dick"})),
        _answered(
            "What is the weather in Helsinki?",
            WEATHER,
            {"city": "Helsinki"},
            {"temperature": 4, "sky": "raining"},
            "4 degrees",
            "raining",
            "Helsinki",
        ),
        _answered("What is 17 times 23?", CALCULATE, {"expression": "17 * 23"}, {"value": 391}, "391"),
        HeldOut((user("What is the capital of Japan?"),), partial(_says, ["Tokyo"]), [WEATHER]),
    ),
    Path(__file__).with_name("tools.jinja"),
)
