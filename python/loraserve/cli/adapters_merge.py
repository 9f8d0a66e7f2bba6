"""`loraserve adapters merge`: writes several adapters as one PEFT adapter, their weighted sum."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loraserve.adapters.manifest import FILE_NAME as MANIFEST
from loraserve.adapters.manifest import AdapterManifest, read_manifest, stamp_manifest
from loraserve.cli.options import MODEL_HELP, Subparsers, add_command
from loraserve.config import EngineConfig
from loraserve.errors import AdapterFormatError, InvalidRequestError

if TYPE_CHECKING:
    from loraserve.adapters.contained import Contained
    from loraserve.adapters.merging import MergedModule, Summand

EXAMPLES = """\
  loraserve adapters merge adapters/sql adapters/pirate --output adapters/both
  loraserve adapters merge adapters/sql adapters/pirate --weights 1,0.5 --rank 16 --output adapters/both

DIR becomes a PEFT directory. Without --rank the sum is exact: the ranks of a linear add up, and each weight
goes into B, whatever the adapters' alphas, patterns and rsLoRA. With --rank R the nearest adapter of that
rank is written, by a singular value decomposition; what it leaves out is told for each linear and in total.

A request can also name several adapters with weights, which gives the same sum without a file. DoRA, biases
and adapters that act from an invocation on are no deltas that could be summed, and are refused. To fold one
adapter into the model it is served on: loraserve serve MODEL --adapter NAME=PATH --merge NAME
"""

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
STAMP: Final = "base_fingerprint"


def add_parser(actions: Subparsers) -> None:
    """Add `merge` to the actions of `adapters`."""
    parser = add_command(actions, "merge", "write the weighted sum of several adapters as one", EXAMPLES)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="PEFT directory; two or more")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where to write the sum")
    parser.add_argument(
        "--weights", metavar="W,W", help="one number per PATH, commas between (default: all 1)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="R", help="highest rank of a linear (default: the sum's own)"
    )
    parser.add_argument(
        "--model",
        help=f"the base of all, to check them against and to read other forms than PEFT's: {MODEL_HELP}",
    )
    parser.add_argument("--overwrite", action="store_true", help="also where DIR holds an adapter already")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the merged adapter and say what it is.

    Raises:
        InvalidRequestError: weights, rank or output can't be used.
        AdapterFormatError, ModelError: the adapters can't be summed, or the sum can't be written.
    """
    weights = _weights(args.weights, len(args.paths))
    if args.rank is not None and args.rank < 1:
        raise InvalidRequestError(f"rank is {args.rank}, it must be at least 1")
    _check_output(args.output, overwrite=args.overwrite)

    from loraserve.adapters import merging  # noqa: PLC0415 (imports torch)

    summands = merging.read_summands(args.paths, weights, args.model)
    merged, modules = merging.merge(summands, args.rank)
    _write(args.output, merged, _common_stamp(summands))
    if args.rank is not None:
        for path, module in modules.items():
            error = module.error / module.size if module.size else 0.0
            print(f"{path}  rank {module.full_rank} to {module.rank}, error {error:.2%}")
        print(f"total error {merging.total_error(modules):.2%} of the sum's Frobenius norm")
    print(_describe(args.output, summands, modules, is_exact=args.rank is None))
    return 0


def _weights(text: str | None, count: int) -> list[float]:
    if count < 2:
        raise InvalidRequestError(f"{count} adapter is given, a sum needs two or more")
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequestError(f"weights is {text!r}, give numbers with commas between") from None
    if len(weights) != count:
        raise InvalidRequestError(f"weights has {len(weights)} numbers, and there are {count} adapters")
    for weight in weights:
        if not math.isfinite(weight) or weight == 0.0:
            raise InvalidRequestError(f"weights has {weight:g}, give finite numbers other than 0")
    return weights


def _check_output(output: Path, *, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise InvalidRequestError(f"{output} is no directory, choose another --output")
    there = sorted(os.listdir(output))
    others = [name for name in there if name not in (WEIGHTS, CONFIG, MANIFEST)]
    if MANIFEST in there and (read_manifest(str(output)) or AdapterManifest()).to_fields().keys() - {STAMP}:
        others.append(MANIFEST)
    if others:
        raise InvalidRequestError(
            f"{output} holds {others[0]!r}, which would lie beside the merged adapter: choose another "
            "--output"
        )
    if there and not overwrite:
        raise InvalidRequestError(f"{output} holds {there[0]!r}: --overwrite writes over it")


def _common_stamp(summands: Sequence[Summand]) -> str | None:
    stamps = {one.stamp for one in summands}
    return stamps.pop() if len(stamps) == 1 else None


def _write(output: Path, merged: Contained, stamp: str | None) -> None:
    """The config last: without it the directory is no adapter."""
    from safetensors.torch import save_file  # noqa: PLC0415 (imports torch)

    from loraserve.validation.files import replace_file  # noqa: PLC0415

    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG).unlink(missing_ok=True)
        (output / MANIFEST).unlink(missing_ok=True)
        save_file(merged.tensors(), output / f"{WEIGHTS}.new", metadata={"format": "pt"})
        os.replace(output / f"{WEIGHTS}.new", output / WEIGHTS)
        if stamp is not None:
            stamp_manifest(str(output), stamp)
        replace_file(output / CONFIG, json.dumps(merged.config(), indent=2).encode())
    except OSError as error:
        raise AdapterFormatError(f"{output} can't be written: {error.strerror or error}") from error


def _describe(
    output: Path, summands: Sequence[Summand], modules: Mapping[str, MergedModule], *, is_exact: bool
) -> str:
    ranks = [module.rank for module in modules.values()]
    low, high = min(ranks), max(ranks)
    shown = f"rank {low}" if low == high else f"ranks {low} to {high}"
    nbytes = (output / WEIGHTS).stat().st_size
    lines = [
        f"{output}: {len(summands)} adapters on {len(modules)} modules, {shown}, {nbytes / 2**20:.2f} MiB"
        + (", exact" if is_exact else "")
    ]
    lines += [
        f"not taken along: template, tokens or defaults beside {one.path}" for one in summands if one.has_text
    ]
    if high > EngineConfig.max_lora_rank:
        lines.append(f"to serve it: --max-lora-rank {high}, or --rank here for a smaller one")
    return "\n".join(lines)
