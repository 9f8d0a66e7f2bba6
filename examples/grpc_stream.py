"""A stream over gRPC from a running server: text as it comes, then what it cost.

    make serve                              # in another terminal: a server on 127.0.0.1:50051
    python examples/grpc_stream.py

`AsyncClient` has the same methods for asyncio. Other languages use `proto/loraserve/v1/loraserve.proto`.
"""

import argparse

from loraserve import SamplingParams
from loraserve.client import Client

QUESTION = "Table planets(name, moons). Which planets have more than 10 moons?"


def main() -> None:
    parser = argparse.ArgumentParser(description="A stream over gRPC from a running server.")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port (default: %(default)s)")
    args = parser.parse_args()
    messages = [{"role": "user", "content": QUESTION}]
    params = SamplingParams(max_tokens=64, temperature=0)
    with Client(args.target) as client:
        for delta in client.stream(messages=messages, params=params, adapter="sql"):
            print(delta.text, end="", flush=True)
    first_token_ms = 1e3 * (delta.timing.queue_s + delta.timing.prefill_s)
    print(f"\n[{delta.usage.completion_tokens} tokens, the first after {first_token_ms:.0f} ms]")


if __name__ == "__main__":
    main()
