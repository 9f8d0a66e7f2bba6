"""`AdapterText`: how an adapter's requests become tokens and its tokens text; and what holds for several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from loraserve._core import Receipt
from loraserve.errors import InvalidRequestError
from loraserve.text.tokenizer import Tokenizer

Value = TypeVar("Value")


@dataclass(frozen=True)
class AddedTokens:
    """Tokens beyond the model's that an adapter has an embedding for, and those that it can choose."""

    known: frozenset[int] = frozenset()
    producible: frozenset[int] = frozenset()

    @classmethod
    def of(cls, receipt: Receipt) -> AddedTokens:
        """Those of an adapter."""
        return cls(frozenset(receipt.added_tokens), frozenset(receipt.added_head_tokens))


NO_TOKENS: Final = AddedTokens()


@dataclass(frozen=True, kw_only=True)
class AdapterText:
    """Of one adapter, or of the model alone; never changed.

    Args:
        tokenizer: its tokens, ends and chat template; the model's own where they are the same.
        sampling_defaults: what its generation_config.json says, as `SamplingParams.with_defaults` takes it.
        template_from: the file that its chat template is from, None where the model's applies.
        num_added: tokens that the model's tokenizer does not have, or not so.
        notes: what is used of it, in words.
        not_used: what differs from the model's and is not used, in words.
    """

    tokenizer: Tokenizer
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    template_from: str | None = None
    num_added: int = 0
    notes: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()


def common_text(
    base: Tokenizer,
    texts: Mapping[str, AdapterText],
    *,
    needs_template: bool = True,
    given: Collection[str] = (),
) -> AdapterText:
    """What holds for a request of all these adapters: of each thing that which one of them alone brings.

    Args:
        base: the model's.
        texts: by the adapters' names.
        needs_template: whether a chat is to be rendered, with no template of the request's own.
        given: sampling parameters that the request gives itself.

    Raises:
        InvalidRequestError: two bring different tokens, ends, templates, or values of a sampling parameter.
    """
    if len(texts) < 2:
        return next(iter(texts.values()), AdapterText(tokenizer=base))
    tokens = _only(texts, _own_tokens(base), "tokens or ends of sequence")
    template = _only(texts, _own_template, "chat templates") if needs_template else None
    names = {name for text in texts.values() for name in text.sampling_defaults if name not in given}
    defaults = {name: _only(texts, _default(name), f"values of {name}") for name in sorted(names)}
    tokenizer = base if tokens is None else texts[tokens].tokenizer
    if template is not None and template != tokens:
        other = texts[template].tokenizer
        tokenizer = tokenizer.variant(
            eos_token_ids=tokenizer.eos_token_ids,
            special_tokens=other.special_tokens,
            chat_template=other.chat_template,
        )
    return AdapterText(
        tokenizer=tokenizer,
        sampling_defaults={
            name: texts[owner].sampling_defaults[name]
            for name, owner in defaults.items()
            if owner is not None
        },
        template_from=None if template is None else texts[template].template_from,
    )


def _only(
    texts: Mapping[str, AdapterText], of: Callable[[AdapterText], Value | None], what: str
) -> str | None:
    """The name of the first adapter that brings something, which all others that do bring as well."""
    found: str | None = None
    for name, text in texts.items():
        value = of(text)
        if value is None:
            continue
        if found is None:
            found = name
        elif value != of(texts[found]):
            raise InvalidRequestError(
                f"adapters {found!r} and {name!r} bring different {what}, and a request of both can have one "
                "only: ask for one of them, or give it in the request where there is a field for it"
            )
    return found


def _own_tokens(base: Tokenizer) -> Callable[[AdapterText], Any]:
    return lambda text: None if text.tokenizer.identity == base.identity else text.tokenizer.identity


def _own_template(text: AdapterText) -> Any:
    template = text.tokenizer.chat_template
    return None if text.template_from is None or template is None else template.identity


def _default(name: str) -> Callable[[AdapterText], Any]:
    return lambda text: text.sampling_defaults.get(name)


def without_weightless(adapters: Sequence[tuple[str, float]]) -> list[str]:
    """Names of (name, weight) pairs that change anything; of a single one always."""
    if len(adapters) < 2:
        return [name for name, _ in adapters]
    return [name for name, weight in adapters if weight != 0.0]
