"""`loraserve generate`: answers prompts in this process and streams them to stdout."""

from __future__ import annotations

import argparse
import asyncio
import functools
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from loraserve.cli.options import (
    Subparsers,
    add_command,
    add_engine_options,
    as_dict,
    engine_config,
    name_and_weight,
)
from loraserve.request import AdapterSpec, ChatOptions, GenerateRequest
from loraserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from loraserve.async_engine import AsyncEngine, RequestStream
    from loraserve.config import EngineConfig

EXAMPLES = """\
  loraserve generate smollm2 -p "The capital of France is" --max-tokens 8 --temperature 0
  loraserve generate smollm2 --adapter sql=adapters/sql -a sql --chat -p "How many users are there?"
  loraserve generate smollm2 --adapter a=x --adapter b=y -a a=0.7 -a b=0.3 -p "Hello"   # weighted sum
"""


def add_parser(commands: Subparsers) -> None:
    """Add `generate` with the options of the engine, the request and the sampling."""
    parser = add_command(commands, "generate", "answer prompts without a server", EXAMPLES)
    add_engine_options(parser)
    group = parser.add_argument_group("request")
    group.add_argument(
        "-p",
        "--prompt",
        action="append",
        required=True,
        metavar="TEXT",
        help="a prompt; repeat for more, they share a batch and are answered in order",
    )
    group.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    group.add_argument(
        "-a",
        "--use",
        action="append",
        default=[],
        type=name_and_weight,
        metavar="NAME[=WEIGHT]",
        help="answer with this adapter; repeat for a weighted sum (default: the base model)",
    )
    _add_sampling_options(parser)
    parser.set_defaults(run=functools.partial(run, parser))


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    defaults = SamplingParams()
    for name, kind, text in (
        ("max_tokens", int, "most tokens of an answer"),
        ("temperature", float, "0 always takes the likeliest token"),
        ("top_p", float, "keep the smallest set of tokens of this probability"),
        ("top_k", int, "keep the K likeliest tokens, 0 keeps all"),
        ("min_p", float, "drop tokens below this fraction of the likeliest"),
        ("repetition_penalty", float, "above 1 discourages tokens of prompt and answer"),
        ("presence_penalty", float, "subtracted once from the logit of a token in the answer"),
        ("frequency_penalty", float, "subtracted for each time a token is in the answer"),
        ("min_tokens", int, "no end before this many tokens"),
    ):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "X",
            help=f"{text} (default {getattr(defaults, name)})",
        )
    group.add_argument("--seed", type=int, metavar="N", help="makes the answer reproducible")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before TEXT; repeat for more",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end token")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Print the answers in the order of the prompts, the first one token by token.

    Exits with a usage error if `-a` names an adapter that `--adapter` does not.

    Raises:
        LoraserveError: the model or an adapter can't be loaded, or a request was refused.
    """
    config = engine_config(args, parser)
    adapter = as_dict(args.use, "-a", parser)
    for name in adapter.keys() - config.adapters.keys():
        parser.error(f"-a names {name!r}, give its files with --adapter {name}=PATH")
    requests = _requests(args, adapter or None)
    asyncio.run(_answer(config, requests))
    return 0


def _requests(args: argparse.Namespace, adapter: AdapterSpec) -> list[GenerateRequest]:
    given = {field.name: getattr(args, field.name, None) for field in fields(SamplingParams)}
    params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    if args.chat:
        return [
            GenerateRequest(
                messages=[{"role": "user", "content": text}],
                chat=ChatOptions(is_parsed=False),
                adapter=adapter,
                params=params,
            )
            for text in args.prompt
        ]
    return [GenerateRequest(prompt=text, adapter=adapter, params=params) for text in args.prompt]


async def _answer(config: EngineConfig, requests: list[GenerateRequest]) -> None:
    from loraserve.async_engine import AsyncEngine  # noqa: PLC0415 (imports torch)

    engine = AsyncEngine(config)
    try:
        await _print_answers(engine, requests)
    finally:
        await engine.shutdown(0.0)


async def _print_answers(engine: AsyncEngine, requests: list[GenerateRequest]) -> None:
    """All requests run at once; the first is shown as it comes, the others when it is their turn."""
    streams: list[RequestStream] = [await engine.submit(request) for request in requests]
    for stream in streams:
        num_tokens, finish_reason = 0, None
        async for delta in stream:
            print(delta.text, end="", flush=True)
            num_tokens += len(delta.token_ids)
            finish_reason = delta.finish_reason
        print(flush=True)
        if finish_reason == "length":
            print(f"(cut after {num_tokens} tokens: --max-tokens N gives more)", file=sys.stderr)
