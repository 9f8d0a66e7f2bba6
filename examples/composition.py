"""Several adapters in one request: a mapping of names to weights is the exact sum of their weighted deltas.

    python examples/composition.py

One weight turns an adapter up or down; two weights blend two adapters. Nothing is merged for it: every
request may ask for weights of its own, and all of them run in one batch.
"""

from pathlib import Path

from loraserve import LLM, SamplingParams

QUESTION = "What is the capital of Japan?"
SPECS = [
    {"pirate": 0.25},
    {"pirate": 0.5},
    {"pirate": 1.0},
    {"pirate": 1.0, "json": 0.5},
    {"pirate": 0.5, "sql": 0.5},
]


def main() -> None:
    folder = Path(__file__).parent / "adapters"
    params = SamplingParams(max_tokens=64, temperature=0)
    with LLM(
        "smollm2", {name: str(folder / name) for name in ("sql", "json", "pirate")}, memory="1GiB"
    ) as llm:
        chats = [[{"role": "user", "content": QUESTION}]] * len(SPECS)
        for output in llm.chat(chats, params, SPECS):
            weights = " + ".join(f"{weight:g} {name}" for name, weight in output.adapter.items())
            print(f"{weights:<22}: {output.text}")


if __name__ == "__main__":
    main()
