"""OpenAI's client on a running server: the model's name chooses the adapter, and the answer streams.

make serve                              # in another terminal: a server on 127.0.0.1:8000
pip install openai
python examples/openai_client.py
"""

import argparse

from openai import OpenAI

QUESTION = "Table cats(name, age). Which cats are older than 9?"


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenAI's client on a running server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--api-key", default="unused", help="where the server has keys")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    names = [model.id for model in client.models.list()]
    print(f"models: {', '.join(names)}")
    for name in names:
        print(f"\n--- {name}")
        stream = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": QUESTION}],
            max_completion_tokens=64,
            temperature=0,
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
