"""`loraserve adapters`: what is done with adapters besides serving them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from loraserve.cli import adapters_merge, adapters_stamp, adapters_verify, adapters_versions
from loraserve.cli.options import (
    MODEL_HELP,
    Subparsers,
    add_command,
    add_dtype_option,
    add_max_lora_rank_option,
)
from loraserve.config import EngineConfig
from loraserve.errors import AdapterFormatError, InvalidRequestError

if TYPE_CHECKING:
    from loraserve.adapters.check import CheckedFiles

EXAMPLES = """\
  loraserve adapters check adapters/sql --model smollm2

Every tensor must fit a module of the model: the exit code is 0 only if all of the adapter would take effect.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `adapters` with its actions."""
    summary = (
        "look at adapters, compare, stamp and merge them; go back and forth between those that are served"
    )
    parser = commands.add_parser("adapters", help=summary, description=f"{summary.capitalize()}.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = add_command(
        actions, "check", "check an adapter against a model and print what it changes", EXAMPLES
    )
    help_ = "PEFT directory, GGUF adapter, or directory of TensorRT-LLM's arrays"
    check.add_argument("path", metavar="PATH", help=help_)
    check.add_argument("--model", required=True, help=MODEL_HELP)
    add_dtype_option(check)
    add_max_lora_rank_option(check)
    check.set_defaults(run=run_check)
    adapters_verify.add_parser(actions)
    adapters_stamp.add_parser(actions)
    adapters_merge.add_parser(actions)
    adapters_versions.add_parser(actions)


def run_check(args: argparse.Namespace) -> int:
    """Print the adapter's receipt.

    Raises:
        ModelError: the model's config, tokenizer or embeddings can't be read.
        AdapterFormatError: some of the adapter would not take effect.
    """
    config = EngineConfig(model=args.model, dtype=args.dtype, max_lora_rank=args.max_lora_rank)
    print(_describe(_check(config, args.path)))
    return 0


def _check(config: EngineConfig, path: str) -> CheckedFiles:
    """Reads the model's config, its tokenizer and the adapter; of the model's weights a row of each, and what
    the adapter has copies of.
    """
    from loraserve.adapters.check import open_check  # noqa: PLC0415 (imports torch)
    from loraserve.loader.resolve import open_checkpoint  # noqa: PLC0415

    with open_checkpoint(config.model) as checkpoint:
        check = open_check(checkpoint, config.model_names, config.dtype, config.max_lora_rank)
        checked = check.check(path)
    try:
        checked.try_chat()
    except InvalidRequestError as error:
        raise AdapterFormatError(f"{path}: manifest: {error}") from error
    return checked


def _describe(checked: CheckedFiles) -> str:
    receipt = checked.receipt
    rows = {
        "tensors": f"{receipt.tensors}, all applied",
        "modules": ", ".join(receipt.modules),
        "layers": ranges(receipt.layers),
        "ranks": ", ".join(map(str, receipt.ranks)),
        "size": f"{receipt.nbytes / 2**20:.2f} MiB in the memory pool",
        "hash": f"blake3 {receipt.hash}",
        "trained on": receipt.base_model or "not named in its config",
        "base": checked.base.verdict,
        "base check": receipt.base_check,
        **_describe_text(checked),
    }
    if receipt.base_copies:
        rows["copies"] = f"{', '.join(receipt.base_copies)}, bit-equal to the model's own and left out"
    lines = [f"{name:<11}{what}" for name, what in rows.items() if what]
    lines += [f"{'note':<11}{what}" for what in receipt.notes]
    return "\n".join([*lines, *(f"{'not used':<11}{what}" for what in receipt.not_used)])


def _describe_text(checked: CheckedFiles) -> dict[str, str]:
    """How its chats are written and its answers read and ended, and what fills the gaps of a request."""
    text, manifest = checked.text, checked.manifest.to_fields()
    tokenizer = text.tokenizer
    template = "the model's" if tokenizer.chat_template else "none, and the model has none: prompts alone"
    ends = (f"{tokenizer.token_name(token_id)!r:.60} ({token_id})" for token_id in tokenizer.eos_token_ids)
    defaults = (f"{name} {value!r:.60}" for name, value in text.sampling_defaults.items())
    return {
        "template": f"of {text.template_from}" if text.template_from else template,
        "tokens": f"the model's and {text.num_added} of its own" if text.num_added else "the model's",
        "ends with": ", ".join(ends) or "nothing: answers are as long as they may be",
        "sampling": f"{', '.join(defaults)}, unless a request says otherwise"
        if text.sampling_defaults
        else "",
        "manifest": f"loraserve.json: {', '.join(manifest)}" if manifest else "",
    }


def ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs shortened: 0, 1, 2, 5 is "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
