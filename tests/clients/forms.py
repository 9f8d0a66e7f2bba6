"""What clients are asked for in the tests: a form with few answers, a tool, and texts that are said."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from tests.tools.models import SAY

ANSWER = '{"city": "Paris", "unit": "c"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ANSWER}}}\n</tool_call>'
HELLO = "Hello, world: 1, 2, 3."


class Place(BaseModel):
    """A city, and the unit of its temperature; nothing else, which a random model would go on with."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "Rome"]
    unit: Literal["c", "f"]


def get_weather(city: Literal["Paris", "Rome"], unit: Literal["c", "f"]) -> str:
    """The weather in a city.

    Args:
        city: Which.
        unit: Of the temperature.
    """
    return f"{city}: 20 {unit}"


def say(text: str) -> str:
    """What a user asks to be answered with this text."""
    return SAY + text
