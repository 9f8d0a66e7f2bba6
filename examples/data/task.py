"""What an adapter is taught: examples to learn from and held-out prompts to judge it by."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Example:
    """One user message and the answer the adapter should give."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class HeldOut:
    """A prompt never trained on, and the test its answer has to pass."""

    prompt: str
    passes: Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """`examples(rng, n)` draws `n` training examples; equal seeds draw equal examples."""

    name: str
    examples: Callable[[Random, int], list[Example]]
    held_out: tuple[HeldOut, ...]


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


def made_up_word(rng: Random) -> str:
    """A word that exists nowhere, so that it can only be copied from the prompt."""
    return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize()
