"""Structured output: a JSON schema, a choice and a regular expression that answers can't leave.

    python examples/structured_output.py

The grammar masks every token that would break the form, so what comes out is valid whatever the model would
have said; an adapter that was trained for the task makes it right as well. Requests with and without a
grammar share a batch.
"""

import json
from pathlib import Path

from loraserve import LLM, Grammar, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "job": {"type": "string", "maxLength": 40},
        "city": {"type": "string", "maxLength": 40},
    },
    "required": ["name", "age", "job", "city"],
    "additionalProperties": False,
}

# (what to ask, which adapter answers, the form of the answer)
REQUESTS = [
    ("Priya Raman, a 41-year-old surgeon, lives in Helsinki.", "json", Grammar("json_schema", PERSON)),
    ("Is a tomato a fruit or a vegetable?", None, Grammar("choice", ["fruit", "vegetable"])),
    ("When did the French Revolution begin?", None, Grammar("regex", r"It began in 1[0-9]{3}\.")),
]


def main() -> None:
    adapters = {"json": str(Path(__file__).parent / "adapters" / "json")}
    with LLM("smollm2", adapters, memory="1GiB") as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": question}] for question, _, _ in REQUESTS],
            [SamplingParams(max_tokens=128, temperature=0, grammar=grammar) for _, _, grammar in REQUESTS],
            [adapter for _, adapter, _ in REQUESTS],
        )
    for (question, _, _), output in zip(REQUESTS, outputs, strict=True):
        print(f"{question}\n    {output.text}")
    person = json.loads(outputs[0].text)
    print(f"{person['name']} is {person['age']} years old")


if __name__ == "__main__":
    main()
