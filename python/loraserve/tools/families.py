"""Families by name, and by what a chat template plainly shows."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from loraserve.errors import InvalidRequestError
from loraserve.tools.formats.base import CallFormat
from loraserve.tools.formats.deepseek import DeepSeekV3, DeepSeekV31
from loraserve.tools.formats.gemma import FunctionGemma, Gemma4
from loraserve.tools.formats.harmony import Harmony
from loraserve.tools.formats.json_calls import Granite, Hermes, Llama3, Mistral, MistralNamed, Phi4
from loraserve.tools.formats.pythonic import Pythonic
from loraserve.tools.formats.xml_calls import Glm45, Qwen3Coder
from loraserve.tools.reasoning import REASONING, ReasoningFormat
from loraserve.validation.did_you_mean import did_you_mean

AUTO, NONE = "auto", "none"
HARMONY: Final = Harmony()

# Of several that a template shows, the first counts: those with marks of their own come before those without.
CALLS: Final[tuple[CallFormat, ...]] = (
    HARMONY,
    DeepSeekV3(),
    DeepSeekV31(),
    Gemma4(),
    FunctionGemma(),
    Qwen3Coder(),
    Glm45(),
    Phi4(),
    Granite(),
    MistralNamed(),
    Mistral(),
    Pythonic(),
    Llama3(),
    Hermes(),
)
CALLS_BY_NAME: Final = {name: one for one in CALLS for name in one.names}
REASONING_BY_NAME: Final = {name: one for one in REASONING for name in one.names}
TOOL_PARSERS: Final = (AUTO, *CALLS_BY_NAME)
REASONING_PARSERS: Final = (AUTO, NONE, *REASONING_BY_NAME)


def check_tool_parser(name: object, what: str = "tool_parser") -> str:
    """The name. Raises InvalidRequestError: there is no such format of calls."""
    return _checked(name, what, TOOL_PARSERS)


def check_reasoning_parser(name: object, what: str = "reasoning_parser") -> str:
    """The name. Raises InvalidRequestError: there is no such format of reasoning."""
    return _checked(name, what, REASONING_PARSERS)


@lru_cache(maxsize=256)
def calls_of(name: str, template: str) -> CallFormat | None:
    """The format of this name, for "auto" the one that the template shows; None where it shows none."""
    if name != AUTO:
        return CALLS_BY_NAME[name]
    return next((one for one in CALLS if one.is_of(template)), None)


@lru_cache(maxsize=256)
def reasoning_of(name: str, template: str) -> ReasoningFormat | None:
    """The format of this name, for "auto" the one that the template shows; None where it shows none."""
    if name == NONE:
        return None
    if name != AUTO:
        return REASONING_BY_NAME[name]
    return next((one for one in REASONING if one.is_of(template)), None)


def _checked(name: object, what: str, known: tuple[str, ...]) -> str:
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        raise InvalidRequestError(f"{what} is {name!r:.100}, it must be one of {', '.join(known)}{hint}")
    return name
