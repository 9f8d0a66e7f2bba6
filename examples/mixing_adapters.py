"""Several adapters in one batch: one question to the base model and to three adapters, answered together.

    python examples/mixing_adapters.py

Each request chooses its adapter; what runs beside it does not change its tokens.
"""

from pathlib import Path

from loraserve import LLM, SamplingParams

NAMES = ["sql", "json", "pirate"]
QUESTION = "Table patients(name, age, ward). How many patients are in each ward?"


def main() -> None:
    folder = Path(__file__).parent / "adapters"
    adapters = [None, *NAMES]  # None is the base model
    params = SamplingParams(max_tokens=64, temperature=0)
    with LLM("smollm2", {name: str(folder / name) for name in NAMES}, memory="1GiB") as llm:
        chats = [[{"role": "user", "content": QUESTION}]] * len(adapters)
        for output in llm.chat(chats, params, adapters):
            print(f"--- {output.adapter or 'base model'}\n{output.text}\n")


if __name__ == "__main__":
    main()
