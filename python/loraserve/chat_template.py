"""ChatTemplate: a model's own Jinja template, rendered in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraserve.did_you_mean import did_you_mean
from loraserve.errors import InvalidRequestError

Message = Mapping[str, Any]


class ChatTemplate:
    """Sees what transformers gives templates: messages, special tokens, raise_exception, strftime_now."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._template: Template | None = None

    def check(self) -> None:
        """Raises InvalidRequestError if it is no template."""
        try:
            self._compiled()
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template is malformed: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The conversation as the model's prompt text.

        Args:
            messages: oldest first.
            add_generation_prompt: a variable; templates begin the assistant's next message where it is true.
            continue_final_message: end the text with the last message, before what the template adds to it.
            kwargs: further variables.

        Raises:
            InvalidRequestError: the template refuses the messages, does not show the final one, or reads no
                variable of a name in `kwargs` but one much like it.
        """
        self._check_kwargs(kwargs)
        turns = [dict(message) for message in messages]
        final = _marked(turns) if continue_final_message else None
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": turns,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._compiled().render(variables)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise InvalidRequestError(f"chat template refused the messages: {error}") from error
        return text if final is None else _cut_at_mark(text, final)

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """A name the template never reads can't change the text, but one that is nearly read is a slip."""
        for name in kwargs.keys() - self._variables if kwargs else ():
            if hint := did_you_mean(name, self._variables):
                raise InvalidRequestError(
                    f"chat_template_kwargs has {name[:100]!r}, which the chat template does not read{hint}"
                )

    @cached_property
    def _variables(self) -> frozenset[str]:
        """Names the template reads and does not set itself."""
        try:
            return frozenset(meta.find_undeclared_variables(_environment().parse(self._source)))
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template is malformed: {error}") from error

    def _compiled(self) -> Template:
        if self._template is None:
            self._template = _environment().from_string(self._source)
        return self._template


_MARK = "\ue000the-final-message-ends-here "  # a private-use character: no message has it by chance


def _marked(turns: list[dict[str, Any]]) -> str:
    """Marks the end of the last message, in place; what it said. Raises InvalidRequestError."""
    content = turns[-1].get("content") if turns else None
    if isinstance(content, str):
        turns[-1]["content"] = content + _MARK
        return content
    parts = [dict(part) for part in content] if isinstance(content, Sequence) else []
    for part in reversed(parts):
        if isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _MARK
            turns[-1]["content"] = parts
            return text
    raise InvalidRequestError("continue_final_message is set, but the final message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    """As transformers cuts: where the template trims the message, the text ends without its spaces too."""
    end = text.rfind(_MARK.strip())
    if end < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message is set, but the chat template does not show the final message as it is"
        )
    return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it does not escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
