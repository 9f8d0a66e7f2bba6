"""`loraserve config check`: says what a settings file means, or what is wrong with it, without serving."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from loraserve.adapters.source import parse_source
from loraserve.adapters.startup import StartingAdapters
from loraserve.cli.options import Subparsers, add_command
from loraserve.settings.fields import OFF
from loraserve.settings.keys import api_keys, hub_repos, prefix_cache_scope
from loraserve.settings.load import load_settings
from loraserve.settings.schema import ServeSettings

if TYPE_CHECKING:
    from loraserve.config import EngineConfig

EXAMPLES = """\
  loraserve config check loraserve.yaml
  loraserve config check config.yaml     # with Baseten's trt_llm block

Reads what `loraserve serve --config FILE` would read, variables LORASERVE_* and files of keys included.
Adapters on this machine are checked against the model; nothing is downloaded. The exit code is 0 only if all
is well.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `config`, whose only action is `check`."""
    summary = "look at settings files without serving"
    parser = commands.add_parser("config", help=summary, description=f"{summary.capitalize()}.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = add_command(actions, "check", "check a settings file and print what it means", EXAMPLES)
    check.add_argument("file", metavar="FILE", type=Path, help="YAML file of settings")
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Print what the file and the environment mean together, a setting a line.

    Raises:
        LoraserveError: `serve` would refuse it; adapters and models on the Hub are not looked at.
    """
    loaded = load_settings({}, os.environ, args.file)
    settings = loaded.settings
    rows = _describe(settings) | _check_parts(settings)
    for name, value in rows.items():
        print(f"{name:<10} {value}")
    if loaded.variables:
        print(f"variables  {', '.join(loaded.variables)}")
    for note in loaded.notes:
        print(f"note       {note}")
    return 0


def _describe(settings: ServeSettings) -> dict[str, str]:
    scheme = "http" if settings.tls_certificate is None else "https"
    http, grpc = settings.http_port, settings.grpc_port
    return {
        "model": settings.model + (f" at {settings.revision}" if settings.revision else ""),
        "names": ", ".join(settings.served_names),
        "http": OFF if http is None else f"{scheme}://{settings.host}:{http}",
        "grpc": OFF if grpc is None else f"{settings.host}:{grpc}",
        "roots": ", ".join(settings.adapter_root) or "none: no path can be loaded at run time",
    }


def _check_parts(settings: ServeSettings) -> dict[str, str]:
    """What only shows when files are opened; raises as `serve` would."""
    from loraserve.server import assembly  # noqa: PLC0415 (imports grpc)

    tls = assembly.tls_config(settings)
    if tls is not None:
        tls.http_context()
    keys = api_keys(settings)
    named = [
        f"{key.name} ({'admin' if key.is_admin else ' '.join(key.adapters) or 'base model only'})"
        for key in keys
    ]
    has_own_cache = prefix_cache_scope(settings, keys) == "key"
    rows = {
        "keys": ", ".join(named) or "none: everybody may use everything, this machine administers",
        "hub": ", ".join(hub_repos(settings, has_keys=bool(keys))) or "none: nothing is fetched at run time",
        "cache": "prompts of a key serve that key only" if has_own_cache else "prompts are shared by all",
    }
    return rows | _check_adapters(settings, assembly.engine_config(settings, with_downloads=False))


def _check_adapters(settings: ServeSettings, config: EngineConfig) -> dict[str, str]:
    """One row for each adapter: its receipt in short, or where it will come from."""
    rows = {
        f"adapter {name}": f"{adapter.adapter_source()}, not checked: it or the model is on the Hub"
        for name, adapter in settings.adapters.items()
    }
    if _is_on_hub(settings.model):
        StartingAdapters(config.failed_adapters).check("fail")
        return rows

    from loraserve.adapters.check import open_check  # noqa: PLC0415 (imports torch)
    from loraserve.loader.resolve import open_checkpoint  # noqa: PLC0415 (imports torch)

    with open_checkpoint(config.model) as checkpoint:
        adapter_check = open_check(checkpoint, config.model_names, config.dtype, config.max_lora_rank)
    starting = StartingAdapters(config.failed_adapters)

    def check(name: str, path: str) -> None:
        checked = adapter_check.check(path, manifest=config.manifests.get(name))
        receipt = checked.receipt
        rows[f"adapter {name}"] = f"{path}: rank {receipt.rank}, {receipt.nbytes / 2**20:.2f} MiB"
        if checked.base.warning is not None:
            rows[f"adapter {name}"] += f"; {checked.base.warning}"
        if receipt.not_used:
            rows[f"adapter {name}"] += f"; not used: {'; '.join(receipt.not_used)}"

    starting.register(config.adapters.items(), check)
    starting.check("fail")
    return rows


def _is_on_hub(model: str) -> bool:
    from loraserve.loader.default import DEFAULT_MODEL  # noqa: PLC0415

    return model != DEFAULT_MODEL and parse_source(model).kind == "hub" and not model.endswith(".gguf")
