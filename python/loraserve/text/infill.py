"""Prompts for what stands between two texts (fill in the middle), as families of code models learn them.

Sources: StarCoder (arXiv 2305.06161), Code Llama (arXiv 2308.12950), DeepSeek-Coder (arXiv 2401.14196),
Qwen2.5-Coder's and Codestral's model cards.
"""

# ruff: noqa: RUF001  (tokens of DeepSeek)

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from loraserve.errors import InvalidRequestError

_PLACE = re.compile(r"\{(prefix|suffix)\}")


@dataclass(frozen=True)
class InfillForm:
    """How a prompt is written: a template with `{prefix}` and `{suffix}`, once each.

    `marks` are the tokens that show the form, `ends` those that end an answer beside the model's own.
    """

    template: str
    marks: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def prompt(self, prefix: str, suffix: str) -> str:
        """The text to be tokenised."""
        parts = {"prefix": prefix, "suffix": suffix}
        return _PLACE.sub(lambda found: parts[found[1]], self.template)


FORMS = (
    InfillForm(
        "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>"),
    ),
    InfillForm(
        "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<|endoftext|>", "<fim_pad>", "<file_sep>"),
    ),
    InfillForm(
        "<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>",
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ),
    InfillForm("▁<PRE> {prefix} ▁<SUF>{suffix} ▁<MID>", ("▁<PRE>", "▁<SUF>", "▁<MID>"), ("▁<EOT>",)),
    InfillForm("[SUFFIX]{suffix}[PREFIX]{prefix}", ("[SUFFIX]", "[PREFIX]")),
)


def check_infill_template(template: object) -> str:
    """The template. Raises InvalidRequestError: it has not one place for each of the two texts."""
    places = _PLACE.findall(template) if isinstance(template, str) else []
    if not isinstance(template, str) or sorted(places) != ["prefix", "suffix"]:
        raise InvalidRequestError(
            f"infill_template is {template!r:.100}, it must be text with {{prefix}} and {{suffix}}, once each"
        )
    return template


def infill_form(template: str | None, id_of: Callable[[str], int | None]) -> InfillForm:
    """The form of an adapter's template, else the one whose tokens there are.

    Raises:
        InvalidRequestError: there is none.
    """
    if template is not None:
        return InfillForm(template)
    for form in FORMS:
        if all(id_of(mark) is not None for mark in form.marks):
            return form
    raise InvalidRequestError(
        "suffix is given, but the tokenizer has no tokens for the middle of a text, as those of StarCoder, "
        "Qwen2.5-Coder, DeepSeek-Coder, CodeLlama and Codestral have: leave it out, or write infill_template "
        "into the adapter's loraserve.json"
    )
