"""`loraserve serve`: one model and its adapters behind gRPC."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging

from loraserve.cli.options import Subparsers, add_command, add_engine_options, engine_config

EXAMPLES = """\
  loraserve serve smollm2 --adapter sql=adapters/sql --adapter pirate=adapters/pirate
  loraserve serve ./Llama-3.1-8B --memory 8GiB --grpc-port 0     # prints the free port it took

Stop it with SIGTERM or Ctrl-C: it takes no new requests and lets running ones finish; a second signal
ends it at once. The server has no authentication: think twice before --host 0.0.0.0.
"""

LOG_LEVELS = ("debug", "info", "warning", "error")


def add_parser(commands: Subparsers) -> None:
    parser = add_command(commands, "serve", "serve a model and its adapters over gRPC", EXAMPLES)
    add_engine_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)"
    )
    group.add_argument(
        "--grpc-port",
        type=int,
        default=50051,
        metavar="PORT",
        help="TCP port of the gRPC API, 0 takes a free one (default %(default)s)",
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="time that running requests get to finish on a stop signal (default %(default)g)",
    )
    group.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="(default %(default)s)")
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if not 0.0 <= args.drain_seconds < float("inf"):
        parser.error(f"--drain-seconds is {args.drain_seconds:g}, it must be 0 or more")
    config = engine_config(args, parser)
    _log_to_stderr(args.log_level)

    from loraserve.server.lifecycle import ServeConfig, serve  # noqa: PLC0415 (imports grpc)

    server = ServeConfig(engine=config, host=args.host, grpc_port=args.grpc_port, drain_s=args.drain_seconds)
    asyncio.run(serve(server))
    return 0


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
