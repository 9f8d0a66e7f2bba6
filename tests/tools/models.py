"""Tiny random models whose chat template and tokens are a family's, and what makes one say a text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from loraserve.engine.frontend import Frontend
from loraserve.engine.prepared import PreparedRequest
from loraserve.sampling.grammar import Grammar
from loraserve.sampling.matcher import Matcher

from tests.e2e.tiny import make_tiny_model

TEMPLATES = Path(__file__).parent / "templates"
SAY = "SAY:"


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def family_tokenizer(tokenizer: Any, name: str, tokens: tuple[str, ...] = ()) -> Any:
    """The demo model's tokens and some special ones, with a template of `TEMPLATES`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template(name)
    return tokenizer


def make_family_model(path: Path, tokenizer: Any, name: str, tokens: tuple[str, ...] = ()) -> str:
    """A directory with a model of `family_tokenizer`."""
    make_tiny_model(path, family_tokenizer(tokenizer, name, tokens), max_position_embeddings=4096)
    return str(path)


def let_models_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose last user message is `SAY` and a text is answered with that text, whatever the weights.

    The text is forced upon the sampler, token by token; all else goes its way.
    """
    usual = Frontend._matcher

    def matcher(self: Frontend[Any], prepared: PreparedRequest) -> Matcher | None:
        said = [turn["content"] for turn in prepared.request.messages or () if turn["role"] == "user"]
        if not said or not isinstance(said[-1], str) or not said[-1].startswith(SAY):
            return usual(self, prepared)
        ids = prepared.tokenizer.encode(said[-1].removeprefix(SAY), add_special_tokens=False)
        text = "start: " + " ".join(f"<[{token_id}]>" for token_id in ids)
        return self._engine.grammars.compile(Grammar("lark", text), prepared.cache_scope, prepared.tokenizer)

    monkeypatch.setattr(Frontend, "_matcher", matcher)
