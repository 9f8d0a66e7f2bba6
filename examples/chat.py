"""A conversation on the terminal: type a line, read the answer; an empty line or Ctrl-D ends it.

    python examples/chat.py
    python examples/chat.py --adapter pirate

The whole conversation is sent with every turn. What was sent before lies in the prefix cache, so a turn costs
what is new in it: the line below each answer says how much came from the cache.
"""

import argparse
from pathlib import Path

from loraserve import LLM, SamplingParams

ADAPTERS = {path.name: str(path) for path in Path(__file__).parent.glob("adapters/*/")}


def main() -> None:
    parser = argparse.ArgumentParser(description="A conversation on the terminal.")
    parser.add_argument("--adapter", choices=sorted(ADAPTERS), help="who answers (default: the base model)")
    adapter = parser.parse_args().adapter
    params = SamplingParams(max_tokens=200, temperature=0)
    messages: list[dict[str, str]] = []
    with LLM("smollm2", ADAPTERS, memory="1GiB") as llm:
        while line := read_line():
            messages.append({"role": "user", "content": line})
            (output,) = llm.chat(messages, params, adapter)
            messages.append({"role": "assistant", "content": output.text})
            print(output.text)
            print(
                f"[prompt: {output.usage.prompt_tokens} tokens, {output.usage.cached_tokens} of them cached]"
            )


def read_line() -> str:
    try:
        return input("you: ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
