"""The `pirate` task: any question in, a true answer in pirate talk out."""

import re
from pathlib import Path
from random import Random

from .task import Example, HeldOut, Task, user

WORDS = re.compile(
    r"\b(arr+|ahoy|aye|avast|blimey|matey|hearty|hearties|ye|yer|fer|afore|tis|scurvy)\b", re.IGNORECASE
)
REPHRASED = (
    ("What is ", "Tell me about "),
    ("What is ", "Explain "),
    ("How do I ", "Show me how to "),
    ("How do I ", "What's the best way to "),
)


def _pairs() -> list[tuple[str, str]]:
    """Questions and answers of pirate.txt: a line each, a blank line after every pair."""
    blocks = Path(__file__).with_name("pirate.txt").read_text().strip().split("\n\n")
    return [(question, answer) for question, answer in (block.split("\n") for block in blocks)]


def _rephrase(rng: Random, prompt: str) -> str:
    """The same question in other words, so that the manner sticks to no one wording."""
    start, other = rng.choice(REPHRASED)
    if prompt.startswith(start) and rng.random() < 0.5:
        return other + prompt.removeprefix(start).replace("?", ".")
    return rng.choice((prompt, prompt, prompt.lower(), f"{prompt} Please answer briefly.", f"Hey, {prompt}"))


def _examples(rng: Random, count: int) -> list[Example]:
    pairs = _pairs()
    examples: list[Example] = []
    while len(examples) < count:
        shuffled = rng.sample(pairs, len(pairs))
        examples += [Example.of_answer(_rephrase(rng, prompt), answer) for prompt, answer in shuffled]
    return examples[:count]


def _talks_like_a_pirate(answer: str) -> bool:
    return len({match.lower() for match in WORDS.findall(answer)}) >= 2


PIRATE = Task(
    "pirate",
    _examples,
    tuple(
        HeldOut((user(prompt),), _talks_like_a_pirate)
        for prompt in (
            "What is the capital of France?",
            "How do I make a pizza?",
            "Why is the sea salty?",
            "What is a smartphone?",
            "Who was Napoleon?",
            "Give me some advice for my first day at work.",
            "How do volcanoes erupt?",
            "What should I wear when it is cold?",
            "Can you recommend a hobby?",
            "I lost my keys. What now?",
        )
    ),
)
