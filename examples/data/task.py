"""What an adapter is taught: examples to learn from and held-out prompts to judge it by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A conversation, and the tools it may call; what the assistant says is what the adapter should say."""

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()

    @classmethod
    def of_answer(cls, prompt: str, answer: str) -> "Example":
        """One user message and its answer."""
        return cls((user(prompt), {"role": "assistant", "content": answer}))


@dataclass(frozen=True)
class HeldOut:
    """Messages never trained on, and the test that the answer to them has to pass."""

    messages: Sequence[Message]
    passes: Callable[[str], bool]
    tools: Sequence[Tool] = ()


@dataclass(frozen=True)
class Task:
    """`examples(rng, n)` draws `n` training examples; equal seeds draw equal examples."""

    name: str
    examples: Callable[[Random, int], list[Example]]
    held_out: tuple[HeldOut, ...]
    chat_template: Path | None = None  # None is the model's


SYLLABLES = (
    "ba",
    "cor",
    "den",
    "el",
    "fa",
    "gri",
    "ho",
    "jul",
    "ka",
    "lo",
    "mar",
    "nev",
    "or",
    "qui",
    "ra",
    "sto",
)


def user(prompt: str) -> Message:
    return {"role": "user", "content": prompt}


def made_up_word(rng: Random) -> str:
    """A word that exists nowhere, so that it can only be copied from the prompt."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()
