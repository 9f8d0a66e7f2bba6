"""A batch in this process: one call answers many prompts, mixed in one batch.

    python examples/python_batch.py

`generate` goes on with each prompt as it stands. Outputs come in the order of the prompts. For more
prompts than memory holds, `generate_iter` takes any iterable and yields outputs as it goes: docs/batches.md.
"""

from loraserve import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, there was",
    "The opposite of hot is",
]


def main() -> None:
    params = SamplingParams(max_tokens=24, temperature=0)  # greedy: the same text every time
    with LLM("smollm2", memory="1GiB") as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt!r} → {output.text!r} ({output.finish_reason})")


if __name__ == "__main__":
    main()
