"""`CheckedAdapter`: one that fits the model and can be served by this engine; `log_receipt`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from loraserve import _core
from loraserve.adapters.check import CheckedFiles
from loraserve.adapters.registry import RegisteredAdapter
from loraserve.adapters.text import AddedTokens
from loraserve.engine.model_runner import ModelRunner
from loraserve.errors import AdapterFormatError, InvalidRequestError
from loraserve.sampling.grammar_compiler import GrammarCompiler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that can be served, and has not been registered yet."""

    name: str
    path: str
    files: CheckedFiles

    def registered(self, turn: int, generation: int) -> RegisteredAdapter:
        """What its name is to mean; the core gives it another adapter id."""
        files = self.files
        return RegisteredAdapter(
            self.name,
            self.path,
            files.receipt,
            0,
            files.manifest,
            files.text,
            turn,
            files.stored,
            files.head,
            generation,
        )


def check_servable(name: str, files: CheckedFiles, runner: ModelRunner, grammars: GrammarCompiler) -> None:
    """What requests would only find out later: the backend, ids of tokens, and what a manifest asks for.

    Raises:
        AdapterFormatError: it can't be served.
    """
    _check_tables(name, files.receipt, runner)
    _check_invocation(name, files.receipt, runner)
    _try_manifest(name, files, runner, grammars)


def log_receipt(name: str, receipt: _core.Receipt, warning: str | None) -> None:
    """What was found in an adapter's files, for the operator; `warning` is the note that is one."""
    for what in receipt.notes:
        level = logging.WARNING if what == warning else logging.INFO
        logger.log(level, "adapter %s: %s", name, what)
    for what in receipt.not_used:
        logger.warning("beside adapter %s, not used: %s", name, what)


def _check_tables(name: str, receipt: _core.Receipt, runner: ModelRunner) -> None:
    if receipt.changes_tables and not runner.changes_tables:
        raise AdapterFormatError(
            f"adapter {name!r} changes embedding, head or norms (modules_to_save, trainable_token_indices, "
            f"target_modules), which the {runner.device} backend does not serve yet: use --device cpu, or "
            "merge it into the model with PEFT"
        )


def _check_invocation(name: str, receipt: _core.Receipt, runner: ModelRunner) -> None:
    try:
        runner.check_token_ids(receipt.invocation_tokens)
    except InvalidRequestError as error:
        raise AdapterFormatError(f"alora_invocation_tokens of adapter {name!r}: {error}") from error


def _try_manifest(name: str, files: CheckedFiles, runner: ModelRunner, grammars: GrammarCompiler) -> None:
    """What a manifest asks for is tried out here, not on a request."""
    manifest, tokenizer = files.manifest, files.text.tokenizer
    try:
        added = AddedTokens.of(files.receipt).producible
        runner.check_token_ids(manifest.sampling.get("stop_token_ids", ()), added)
        runner.check_token_ids(manifest.sampling.get("logit_bias", ()), added)
        files.try_chat()
        if manifest.grammar is not None:
            grammars.compile(manifest.grammar, tokenizer=tokenizer)
    except InvalidRequestError as error:
        raise AdapterFormatError(f"manifest of adapter {name!r}: {error}") from error
