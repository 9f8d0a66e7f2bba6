"""`loraserve deploy`: several engines behind one address, on Ray Serve."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path

from loraserve.cli.options import Subparsers, add_command
from loraserve.cli.serve_options import add_serve_options, given_flags
from loraserve.settings.errors import ConfigError
from loraserve.settings.load import load_settings

# Before Ray is imported: it would listen on all addresses, 127.0.0.1 given or not, and call home. What
# Serve's replicas listen on anyway asks for a token.
LOCAL_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # between ingress and replicas: half of what actors' calls take
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # of 0.1, which takes 3% of a core
}

EXAMPLES = """\
  loraserve deploy smollm2 --replicas 2 --memory 1GiB --adapter sql=adapters/sql
  loraserve deploy ./Llama-3.1-8B --device cuda --replicas 2 --max-replicas 8 --ray-address auto

Settings are those of `loraserve serve`, of each engine or of the ingress that all share: docs/replicas.md.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `deploy`, with a flag for every setting."""
    parser = add_command(commands, "deploy", "serve with several engines, on Ray Serve", EXAMPLES)
    add_serve_options(parser)
    parser.set_defaults(run=functools.partial(run, parser))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Serve until a stop signal.

    Raises:
        LoraserveError: a setting is wrong, a port can't be had, or the replicas don't start.
    """
    config = None if args.config is None else Path(args.config)
    flags = given_flags(args, parser)
    loaded = load_settings(flags.values, os.environ, config, flags.notes)
    if loaded.settings.ray_address is None:
        os.environ |= LOCAL_RAY
    try:
        from loraserve.ray.deploy import deploy  # noqa: PLC0415 (an extra)
    except ImportError as error:
        if error.name != "ray":
            raise
        raise ConfigError("Ray is not installed: pip install 'loraserve[ray]'") from None
    from loraserve.server.observe.logs import configure_logs  # noqa: PLC0415 (with the extra)

    configure_logs(loaded.settings.log_level, loaded.settings.log_format)
    deploy(loaded)
    return 0
