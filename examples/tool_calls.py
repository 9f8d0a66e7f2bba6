"""OpenAI's client with tools: the model calls a function of this program, and answers with what it returned.

make serve                              # in another terminal: a server on 127.0.0.1:8000
pip install openai
python examples/tool_calls.py
"""

import argparse
import json

from openai import OpenAI

QUESTION = "What is the weather in Helsinki?"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Current weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def get_weather(city: str) -> dict[str, object]:
    """What a service would know."""
    return {"temperature": len(city), "sky": "sunny"}


def main() -> None:
    parser = argparse.ArgumentParser(description="OpenAI's client with tools.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--api-key", default="unused", help="where the server has keys")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    messages = [{"role": "user", "content": QUESTION}]
    for tool_choice in ("required", "auto"):  # the first answer is a call whose arguments fit the schema
        answer = client.chat.completions.create(
            model="tools",
            messages=messages,
            tools=TOOLS,
            tool_choice=tool_choice,
            parallel_tool_calls=False,
            max_completion_tokens=64,
            temperature=0,
        )
        message = answer.choices[0].message
        messages.append(message)
        for call in message.tool_calls or ():
            print(f"calls {call.function.name} {call.function.arguments}")
            result = get_weather(**json.loads(call.function.arguments))
            print(f"which returns {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    print(message.content)


if __name__ == "__main__":
    main()
