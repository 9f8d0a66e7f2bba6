"""`loraserve serve`: one model and its adapters behind HTTP and gRPC."""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

from loraserve.cli.options import Subparsers, add_command
from loraserve.cli.serve_options import add_serve_options, given_flags
from loraserve.settings.errors import ConfigError
from loraserve.settings.load import load_settings

EXAMPLES = """\
  loraserve serve smollm2 --adapter sql=adapters/sql --adapter pirate=adapters/pirate
  loraserve serve ./Llama-3.1-8B --memory 8GiB --port 0     # prints the free port it took
  loraserve serve --config loraserve.yaml
  LORASERVE_ADMIN_KEY=… loraserve serve smollm2 --host 0.0.0.0 --keys-file keys.yaml --adapter-root /adapters

A flag wins over its variable (in brackets), a variable over the file, where the setting is called as the
variable without LORASERVE_, in lower case. `loraserve config check FILE` checks a file.

Stop it with SIGTERM or Ctrl-C: it takes no new requests and lets running ones finish; a second signal
ends it at once. Without keys everybody who reaches the server may use it, and this machine may load and
unload adapters: think twice before --host 0.0.0.0.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `serve`, with a flag for every setting."""
    parser = add_command(commands, "serve", "serve a model and its adapters over HTTP and gRPC", EXAMPLES)
    add_serve_options(parser)
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> NoReturn:
    """Serve until a stop signal, then end the process.

    Exits with a usage error if flags contradict one another.

    Raises:
        LoraserveError: a setting is wrong, a port can't be had, the model can't be loaded, or the
            engine failed.
    """
    config = None if args.config is None else Path(args.config)
    flags = given_flags(args, parser)
    loaded = load_settings(flags.values, os.environ, config, flags.notes)
    if loaded.settings.is_replicated:
        raise ConfigError("settings of several engines are given: `loraserve deploy` takes them")

    from loraserve.server.lifecycle import leave, serve  # noqa: PLC0415 (imports grpc)
    from loraserve.server.observe.logs import configure_logs  # noqa: PLC0415

    configure_logs(loaded.settings.log_level, loaded.settings.log_format)
    run_loop(serve(loaded))
    leave()


def run_loop(main: Coroutine[Any, Any, None]) -> None:
    """Runs `main` on uvloop where it is installed, else on asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415 (not on every platform)
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
