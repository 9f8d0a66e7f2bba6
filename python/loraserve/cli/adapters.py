"""`loraserve adapters`: looks at adapters without serving them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from loraserve.cli import adapters_verify
from loraserve.cli.options import (
    MODEL_HELP,
    Subparsers,
    add_command,
    add_dtype_option,
    add_max_lora_rank_option,
)
from loraserve.config import EngineConfig

if TYPE_CHECKING:
    from loraserve._core import Receipt

EXAMPLES = """\
  loraserve adapters check adapters/sql --model smollm2

Every tensor must fit a module of the model: the exit code is 0 only if all of the adapter would take effect.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `adapters` with its actions."""
    summary = "look at adapters without serving them"
    parser = commands.add_parser("adapters", help=summary, description=f"{summary.capitalize()}.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = add_command(
        actions, "check", "check an adapter against a model and print what it changes", EXAMPLES
    )
    check.add_argument("path", metavar="PATH", help="PEFT directory")
    check.add_argument("--model", required=True, help=MODEL_HELP)
    add_dtype_option(check)
    add_max_lora_rank_option(check)
    check.set_defaults(run=run_check)
    adapters_verify.add_parser(actions)


def run_check(args: argparse.Namespace) -> int:
    """Print the adapter's receipt.

    Raises:
        ModelError: the model's config, tokenizer or embeddings can't be read.
        AdapterFormatError: some of the adapter would not take effect.
    """
    config = EngineConfig(model=args.model, dtype=args.dtype, max_lora_rank=args.max_lora_rank)
    print(_describe(_check(config, args.path)))
    return 0


def _check(config: EngineConfig, path: str) -> Receipt:
    """Reads the model's config, its tokenizer and the adapter; of the model's weights only what the adapter
    has copies of.
    """
    from loraserve.adapters.check import open_check  # noqa: PLC0415 (imports torch)
    from loraserve.loader.resolve import open_checkpoint  # noqa: PLC0415

    with open_checkpoint(config.model) as checkpoint:
        return open_check(checkpoint, config.dtype, config.max_lora_rank).check(path)


def _describe(receipt: Receipt) -> str:
    rows = {
        "tensors": f"{receipt.tensors}, all applied",
        "modules": ", ".join(receipt.modules),
        "layers": ranges(receipt.layers),
        "ranks": ", ".join(map(str, receipt.ranks)),
        "size": f"{receipt.nbytes / 2**20:.2f} MiB in the memory pool",
        "hash": f"blake3 {receipt.hash}",
        "trained on": receipt.base_model or "not named in its config",
        "base check": receipt.base_check,
    }
    if receipt.base_copies:
        rows["copies"] = f"{', '.join(receipt.base_copies)}, bit-equal to the model's own and left out"
    lines = [f"{name:<11}{value}" for name, value in rows.items()]
    return "\n".join([*lines, *(f"{'not used':<11}{what}" for what in receipt.not_used)])


def ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs shortened: 0, 1, 2, 5 is "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
