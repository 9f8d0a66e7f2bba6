"""The command line: picks the subcommand and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from loraserve.cli.options import OneLineParser
from loraserve.errors import LoraserveError
from loraserve.validation.printable import printable

COMMANDS = (  # modules of this package
    "serve",
    "deploy",
    "generate",
    "batch",
    "adapters",
    "config",
    "plan",
    "simulate",
    "doctor",
)

EXAMPLES = """\
examples:
  loraserve generate smollm2 -p "The capital of France is"
  loraserve serve smollm2 --adapter sql=adapters/sql --adapter pirate=adapters/pirate
  loraserve deploy smollm2 --replicas 2 --memory 1GiB
  loraserve batch input.jsonl -o output.jsonl --model smollm2 --adapter sql=adapters/sql
  loraserve adapters check adapters/sql --model smollm2
  loraserve config check loraserve.yaml
  loraserve plan llama-3-8b --hardware h100 --adapters 1000 --requests-per-second 50
  loraserve doctor

`loraserve COMMAND --help` explains a command. The model "smollm2" comes with loraserve[demo].
"""

MAX_LINE_CHARS = 4000
OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
FLAG_CUTOFF = 0.8  # below, a guess misleads
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, 1 after an error of loraserve, 130 after an interrupt; 2 is bad usage."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            print("loraserve: error: too many open files, raise the limit (ulimit -n)", file=sys.stderr)
            return EXIT_ERROR
        if error.errno not in OUTPUT_ERRORS or error.filename is not None:
            raise
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whose reader left
            print(f"loraserve: error: the output can't be written: {error.strerror}", file=sys.stderr)
        return EXIT_ERROR


def _run(argv: Sequence[str]) -> int:
    # One command's module alone: doctor runs where what another one imports is missing.
    named = [command for command in COMMANDS if command in argv[:1]]
    parser = build_parser(named or COMMANDS)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        args.parser.error(_unknown_text(args.parser, unknown))
    try:
        status: int = args.run(args)
    except LoraserveError as error:
        print(_error_text(error), file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return status


def _error_text(error: LoraserveError) -> str:
    """What failed, line by line; what a file put into it can't begin a line or move the cursor."""
    first, *more = [printable(line, MAX_LINE_CHARS) for line in str(error).split("\n")]
    return "\n  ".join([f"loraserve: error: {first}", *more])


def _unknown_text(command: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    text = f"unrecognized arguments: {' '.join(unknown)}"
    flags = command._option_string_actions  # argparse has no other list of them
    likely = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1, FLAG_CUTOFF)
    return f"{text}; did you mean {likely[0]}?" if likely else text


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of these commands."""
    parser = OneLineParser(
        prog="loraserve",
        description="Serve hundreds of LoRA adapters on one base LLM, mixed in one batch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        import_module(f"loraserve.cli.{command}").add_parser(subparsers)
    return parser


class _PrintVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from loraserve._core import __version__  # noqa: PLC0415 (a compiled module, needed here only)

        print(f"loraserve {__version__}")
        parser.exit()
