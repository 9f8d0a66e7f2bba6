"""`loraserve adapters stamp`: writes into an adapter which base model it was trained on."""

from __future__ import annotations

import argparse

from loraserve.cli.options import MODEL_HELP, Subparsers, add_command
from loraserve.config import EngineConfig
from loraserve.errors import AdapterFormatError

EXAMPLES = """\
  loraserve adapters stamp adapters/sql --model meta-llama/Llama-3.1-8B-Instruct

The fingerprint of MODEL's weights goes into PATH/loraserve.json as base_fingerprint, beside what is there.
From then on the adapter is served with these weights only, whatever they are called and whichever file format
holds them; a quantised model has other weights. Stamp with the model the adapter was trained on.
"""


def add_parser(actions: Subparsers) -> None:
    """Add `stamp` to the actions of `adapters`."""
    stamp = add_command(actions, "stamp", "write into an adapter which model it was trained on", EXAMPLES)
    stamp.add_argument("path", metavar="PATH", help="PEFT directory")
    stamp.add_argument("--model", required=True, help=MODEL_HELP)
    stamp.add_argument("--replace", action="store_true", help="also where it is stamped for another model")
    stamp.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check that the adapter fits the model, then write the stamp.

    Raises:
        ModelError: the model can't be read.
        AdapterFormatError: the adapter does not fit it, is no directory, is stamped for another, or can't be
            written.
    """
    from loraserve.adapters.check import open_check  # noqa: PLC0415 (imports torch)
    from loraserve.adapters.manifest import FILE_NAME, AdapterManifest, stamp_manifest  # noqa: PLC0415
    from loraserve.loader.resolve import open_checkpoint  # noqa: PLC0415

    with open_checkpoint(args.model) as checkpoint:
        check = open_check(checkpoint, (args.model,), EngineConfig.dtype, EngineConfig.max_lora_rank)
    stamp = check.base.fingerprint
    # The stamp that is there, if it is of another base, is for `stamp_manifest` to refuse.
    checked = check.check(args.path, manifest=AdapterManifest(base_fingerprint=stamp))
    directory = checked.manifest_directory
    if directory is None:
        raise AdapterFormatError(
            f"{args.path} is a file, a stamp is written into the directory of an adapter"
        )
    try:
        old = stamp_manifest(directory, stamp, replace=args.replace)
    except OSError as error:
        raise AdapterFormatError(f"{directory}/{FILE_NAME} can't be written: {error.strerror}") from error
    was = "is already" if old == stamp else "is" if old is None else f"was stamped for {old}, is now"
    print(f"{directory} {was} stamped for {stamp}")
    named = check.base.compare(args.path, AdapterManifest(), checked.receipt.base_model)
    if named.warning is not None:
        print(f"its config names {checked.receipt.base_model!r}, not {args.model!r}: the stamp counts")
    return 0
