"""With and without guesses ahead, on the demo adapters: `python benches/bench_speculation.py`.

Both engines are asked the same in turn, new prompts every round, so that no answer has been given before; the
first round warms up. The answers of both must be equal. Times are of whole requests, prompts and all.

One request at a time, in the file's own 4-bit weights and in bfloat16, then eight and 32 at once:

    python benches/bench_speculation.py
    python benches/bench_speculation.py --quantization none
    python benches/bench_speculation.py --workload mix --at-once 8 --prompts 32
    python benches/bench_speculation.py --workload mix --at-once 32 --prompts 64

Where other programs take the cores, `--clock cpu --threads 1` counts what the process had of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import machine
from loraserve import LLM, Grammar, SamplingParams

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from data import TASKS, Example  # type: ignore[import-not-found]  # noqa: E402

SUBJECTS = ("the sea", "a dragon", "winter", "a lighthouse", "two sisters", "the first train", "a lost key")
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class Question:
    """What is asked of one adapter, or of the base model, and how."""

    prompt: str
    adapter: str | None
    params: SamplingParams


def of_task(name: str, *, has_schema: bool = False) -> Callable[[Random, int], list[Question]]:
    """Examples of an adapter's task that it was not trained on, answered greedily."""

    def draw(rng: Random, count: int) -> list[Question]:
        examples: list[Example] = TASKS[name].examples(rng, count)
        grammars = [
            schema_of(example.messages[-1]["content"]) if has_schema else None for example in examples
        ]
        return [
            Question(
                example.messages[0]["content"],
                name,
                SamplingParams(max_tokens=100, temperature=0.0, grammar=grammar),
            )
            for example, grammar in zip(examples, grammars, strict=True)
        ]

    return draw


def schema_of(answer: str) -> Grammar:
    """The form of a JSON object: its fields, in their order, and their types."""
    fields = {key: {"type": TYPES[type(value)]} for key, value in json.loads(answer).items()}
    return Grammar(
        "json_schema",
        {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False},
    )


def random_text(rng: Random, count: int) -> list[Question]:
    """Stories as they come at temperature 1: little that could be guessed."""
    return [
        Question(
            f"Tell me a story about {rng.choice(SUBJECTS)}.",
            None,
            SamplingParams(max_tokens=100, temperature=1.0, seed=rng.randrange(2**31), ignore_eos=True),
        )
        for _ in range(count)
    ]


def mix(rng: Random, count: int) -> list[Question]:
    """Of all adapters and the base model in turn."""
    draws = [of_task("json"), of_task("sql"), of_task("pirate"), random_text]
    columns = [draw(rng, -(-count // len(draws))) for draw in draws]
    return [question for row in zip(*columns, strict=True) for question in row][:count]


WORKLOADS = {
    "JSON": of_task("json"),
    "JSON of a schema": of_task("json", has_schema=True),
    "SQL": of_task("sql"),
    "pirate talk": of_task("pirate"),
    "random text": random_text,
    "mix": mix,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Setting:
    """How a workload is asked: `prompts` a round, `at_once` of them together, timed by a clock in seconds."""

    rounds: int
    prompts: int
    at_once: int
    clock: Callable[[], float]


def ask(llm: LLM, questions: Sequence[Question], setting: Setting) -> tuple[list[list[int]], float]:
    """The answers, and how many seconds they took."""
    answers = []
    started = setting.clock()
    for first in range(0, len(questions), setting.at_once):
        asked = questions[first : first + setting.at_once]
        chats = [[{"role": "user", "content": question.prompt}] for question in asked]
        params, adapters = [question.params for question in asked], [question.adapter for question in asked]
        answers += [output.token_ids for output in llm.chat(chats, params, adapters)]
    return answers, setting.clock() - started


def compare(off: LLM, on: LLM, name: str, setting: Setting) -> str:
    """A line of the table; raises SystemExit where an answer differs."""
    ratios, token_ms = list[float](), list[tuple[float, float]]()
    counted = on.stats()
    for number in range(setting.rounds + 1):
        questions = WORKLOADS[name](Random(f"{name} {number}"), setting.prompts)
        order = (off, on) if number % 2 else (on, off)
        results = {id(llm): ask(llm, questions, setting) for llm in order}
        (expected, off_s), (answers, on_s) = results[id(off)], results[id(on)]
        if answers != expected:
            raise SystemExit(f"{name}: answers differ in round {number}")
        if number == 0:
            counted = on.stats()
            continue
        num_tokens = sum(map(len, answers))
        ratios.append(off_s / on_s)
        token_ms.append((1000 * off_s / num_tokens, 1000 * on_s / num_tokens))
    stats = on.stats()
    num_drafted = stats.num_draft_tokens - counted.num_draft_tokens
    num_accepted = stats.num_accepted_tokens - counted.num_accepted_tokens
    off_ms, on_ms = (statistics.median(column) for column in zip(*token_ms, strict=True))
    return (
        f"{name:17} {off_ms:6.1f} {on_ms:6.1f} ms a token, {statistics.median(ratios):5.2f} x "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {num_accepted} of {num_drafted} guesses came"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default=None, help="as of the engine (default: as the file)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=10, help="a round")
    parser.add_argument("--at-once", type=int, default=1, help="requests")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--workload", action="append", choices=WORKLOADS, help="repeat for more (default: all)"
    )
    args = parser.parse_args()
    setting = Setting(args.rounds, args.prompts, args.at_once, CLOCKS[args.clock])
    weights = args.quantization or "the file's"
    print(f"{machine.title()}, {args.dtype}, weights: {weights}, {args.at_once} at once, {args.clock} time")
    adapters = {path.name: str(path) for path in sorted((EXAMPLES / "adapters").iterdir()) if path.is_dir()}
    settings = {
        "dtype": args.dtype,
        "quantization": args.quantization,
        "device": "cpu",
        "num_threads": args.threads,
        "memory": "512MiB",
    }
    with (
        LLM(args.model, adapters, speculate="off", **settings) as off,
        LLM(args.model, adapters, speculate="ngram", **settings) as on,
    ):
        for name in args.workload or [name for name in WORKLOADS if name != "mix"]:
            print(compare(off, on, name, setting), flush=True)


if __name__ == "__main__":
    main()
