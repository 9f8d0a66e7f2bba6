"""`loraserve adapters verify`: an adapter's answers compared with PEFT's, position by position."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraserve.cli.options import MODEL_HELP, Subparsers, add_command, add_max_lora_rank_option
from loraserve.config import EngineConfig
from loraserve.errors import AdapterFormatError, ModelError

if TYPE_CHECKING:
    from loraserve.cli.verification import Position
    from loraserve.text.tokenizer import Tokenizer

EXAMPLES = """\
  loraserve adapters verify adapters/sql --model smollm2
  loraserve adapters verify adapters/sql --model smollm2 --prompts questions.txt --max-tokens 64

Both sides compute in float32 on this machine's CPU, one after the other: the model needs 4 bytes a parameter.
The exit code is 0 only if all answers are PEFT's. Needs loraserve[verify].
"""

PROMPTS = (
    "The capital of France is",
    "Write a SQL query that counts the users who signed up last week.",
    "def fibonacci(n):\n",
    "Translate into German: The weather is nice today, so we are going for a walk by the river.",
    "1, 2, 3, 5, 8, 13,",
    "Once upon a time there was a small robot who lived at the edge of a large forest. Every morning it went "
    "out to look for things that people had lost, and every evening it wrote down what it had found. One day "
    "the notebook was full. The robot thought for a while, and then",
)


def add_parser(actions: Subparsers) -> None:
    """Add `verify` to the actions of `adapters`."""
    verify = add_command(
        actions, "verify", "compare an adapter's answers with PEFT's on this machine", EXAMPLES
    )
    verify.add_argument("path", metavar="PATH", help="PEFT directory")
    verify.add_argument("--model", required=True, help=MODEL_HELP)
    verify.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts to answer, one per line (default: six of several kinds, as chats if the model has a "
        "template)",
    )
    verify.add_argument(
        "--max-tokens",
        type=int,
        default=32,
        metavar="N",
        help="most tokens of an answer (default %(default)s)",
    )
    add_max_lora_rank_option(verify)
    verify.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if an answer is not PEFT's.

    Raises:
        LoraserveError: the model, the adapter or the prompts can't be read, or transformers and PEFT are
            missing.
    """
    from loraserve.adapters.check import open_check  # noqa: PLC0415 (imports torch)
    from loraserve.cli import verification  # noqa: PLC0415
    from loraserve.loader.resolve import open_checkpoint  # noqa: PLC0415

    own = verification.read_prompts(args.prompts) if args.prompts is not None else None
    config = EngineConfig(
        model=args.model,
        adapters={verification.NAME: args.path},
        dtype="float32",
        quantization="none",  # as transformers reads it
        device="cpu",
        max_lora_rank=args.max_lora_rank,
    )
    with open_checkpoint(config.model) as checkpoint:
        model = checkpoint.path
        check = open_check(checkpoint, config.model_names, config.dtype, config.max_lora_rank)
        checked = check.check(args.path)
    if checked.stored is not None:
        raise AdapterFormatError(
            f"{args.path}: PEFT reads no such adapter, so there is nothing to compare with"
        )
    tokenizer, directory = checked.text.tokenizer, checked.receipt.directory
    prompts = [tokenizer.encode(text) for text in own] if own else _default_prompts(tokenizer)
    config = dataclasses.replace(config, model=str(model))
    answers = verification.serve(config, prompts, args.max_tokens)
    reference = verification.PeftReference(model, directory, checked.receipt.added_tokens)
    compared = []
    for answer in answers:
        positions = reference.compare(answer)
        compared.append(positions)
        print(_show(tokenizer, answer.prompt, positions), flush=True)
    print(_verdict(compared))
    return 0 if _is_equal(compared) else 1


def _default_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    if tokenizer.chat_template is None:
        return [tokenizer.encode(text) for text in PROMPTS]
    return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS]


def _show(tokenizer: Tokenizer, prompt: Sequence[int], positions: Sequence[Position]) -> str:
    """The prompt's end and both texts; PEFT's up to where it goes another way."""
    served = [position.token_id for position in positions]
    first = next((index for index, position in enumerate(positions) if position.differs), None)
    peft = "the same"
    if first is not None:
        peft = f"{tokenizer.decode([*served[:first], positions[first].peft_token_id])!r:.300} …"
    error = max((position.error for position in positions), default=0.0)
    return "\n".join(
        (
            f"prompt     …{tokenizer.decode(list(prompt))[-60:]!r}",
            f"loraserve  {tokenizer.decode(served)!r:.300}",
            f"PEFT       {peft}",
            f"error      {error:.1e} of a log-probability at most, {len(positions)} positions",
            "",
        )
    )


def _is_equal(compared: Sequence[Sequence[Position]]) -> bool:
    from loraserve.cli.verification import MAX_ERROR  # noqa: PLC0415

    return not any(
        position.differs or position.error > MAX_ERROR for positions in compared for position in positions
    )


def _verdict(compared: Sequence[Sequence[Position]]) -> str:
    from loraserve.cli.verification import MAX_ERROR, NO_CHANGE  # noqa: PLC0415

    flat = [position for positions in compared for position in positions]
    if not flat:
        raise ModelError("no answer has a token: give prompts that the model goes on with")
    error, change = max(p.error for p in flat), max(p.change for p in flat)
    if _is_equal(compared):
        verdict = f"EQUAL: every token is PEFT's, log-probabilities differ by {error:.1e} at most"
    else:
        num_other = sum(position.differs for position in flat)
        verdict = (
            f"DIFFERENT: {num_other} of {len(flat)} tokens are not PEFT's, log-probabilities differ by "
            f"{error:.1e} (limit {MAX_ERROR:.0e})"
        )
    if change < NO_CHANGE:
        return f"{verdict}\nThe adapter changes nothing: with PEFT, too, the base model answers the same"
    return f"{verdict}\nThe adapter moves the base model's log-probabilities by up to {change:.2f}"
