"""An adapter loaded into a running server, asked, replaced and unloaded, while the server goes on serving.

    make serve                              # in another terminal: a server on 127.0.0.1:50051
    python examples/load_at_run_time.py

A path is looked for below the server's `--adapter-root`: with `make serve` that is `examples/adapters`. Over
HTTP the same is `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`. Where the server has keys,
it takes an admin's: `Client(target, api_key=…)`.
"""

import argparse

from loraserve import SamplingParams
from loraserve.client import Client

QUESTION = "Table planets(name, moons). Which planets have more than 10 moons?"


def main() -> None:
    parser = argparse.ArgumentParser(description="An adapter loaded into a running server.")
    parser.add_argument("--target", default="127.0.0.1:50051", help="host:port (default: %(default)s)")
    args = parser.parse_args()
    with Client(args.target) as client:
        receipt = client.load_adapter("guest", "pirate")  # checked against the model before it has a name
        print(f"guest is pirate: rank {receipt.rank} on {', '.join(receipt.modules)}")
        print(f"base model: {receipt.base_check}")
        print(f"in memory after {client.warm_adapter('guest'):.3f} s, ahead of the first request")
        ask(client)
        client.load_adapter("guest", "sql", replace=True)  # no request is refused meanwhile
        print("guest is sql")
        ask(client)
        client.unload_adapter("guest")
        print(f"left: {', '.join(sorted(adapter.name for adapter in client.adapters()))}")


def ask(client: Client) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    (answer,) = client.generate(
        messages=messages, params=SamplingParams(max_tokens=64, temperature=0), adapter="guest"
    )
    print(f"    {answer.text}")


if __name__ == "__main__":
    main()
