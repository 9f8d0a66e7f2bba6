"""ChatTemplate: a model's own Jinja template, rendered in a sandbox with what transformers shows it."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from loraserve.confined.pool import ConfinedError
from loraserve.errors import InvalidRequestError
from loraserve.text.template_pool import TemplatePool, shared_pool
from loraserve.tools.call import past_arguments
from loraserve.validation.did_you_mean import did_you_mean

Message = Mapping[str, Any]

# Names under which a message carries its reasoning; templates read the first, some of them the second.
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ROLES_THAT_SAY_SOMETHING = ("system", "developer", "user")  # others may call tools instead
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", *REASONING_FIELDS)

# A subclass may have methods of its own; these give the value alone. A bool is an int, so it comes first.
_SCALARS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (bool, bool),
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
)


_TOOLS = re.compile(r"\btools\b")
# ASCII letters, so that no filter escapes it; the space shows whether the template trims the message.
_MARK = "the-final-message-ends-here-q7Zf4K "


class ChatTemplate:
    """Renders as `apply_chat_template` of transformers does: the same variables, functions and filters."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], pool: TemplatePool | None = None
    ) -> None:
        """`pool` has the processes that render it; the one of this process unless given."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._pool = pool

    @property
    def identity(self) -> tuple[str, frozenset[tuple[str, str]]]:
        """Equal where all chats are rendered alike."""
        return self.source, frozenset(self._special_tokens.items())

    @property
    def takes_tools(self) -> bool:
        """Whether it reads the variable `tools`."""
        return _TOOLS.search(self.source) is not None

    def check(self) -> None:
        """Raises InvalidRequestError if it is no template."""
        _ = self._variables

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the model's prompt text.

        Args:
            messages: oldest first; a field that is null is as good as absent.
            add_generation_prompt: a variable; templates begin the assistant's next message where it is true.
            continue_final_message: end the text with the last message, before what the template adds to it.
            kwargs: further variables.
            tools: functions in OpenAI's form, which the template may show.

        Raises:
            InvalidRequestError: the template refuses the messages, does not show the final one, or reads no
                variable of a name in `kwargs` but one much like it.
        """
        self._check_kwargs(kwargs)
        turns = [_with_objects(_with_reasoning(_plain_message(message))) for message in messages]
        final = self._marked(turns) if continue_final_message else None
        variables = {
            "tools": _plain(tools) if tools else None,
            "documents": None,
            **self._special_tokens,
            **_plain(kwargs),
            "messages": turns,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = (self._pool or shared_pool()).render(self.source, variables)
        except ConfinedError as error:
            raise InvalidRequestError(f"chat template refused the messages: {error}") from None
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
            return (self._pool or shared_pool()).names(self.source)
        except ConfinedError as error:
            raise InvalidRequestError(f"the chat template is malformed: {error}") from None

    def _marked(self, turns: list[dict[str, Any]]) -> str:
        """Marks the end of the last message, in place; what it said. Raises InvalidRequestError."""
        content = turns[-1].get("content") if turns else None
        if "content" not in self.source:
            raise InvalidRequestError(
                "continue_final_message is set, but the chat template does not show the final message"
            )
        if isinstance(content, str):
            turns[-1]["content"] = content + _MARK
            return content
        for part in reversed(content if isinstance(content, list | tuple) else ()):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + _MARK
                return text
        raise InvalidRequestError(
            "continue_final_message is set, but the final message has no text to continue"
        )


def _plain_message(message: Any) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise InvalidRequestError(
            f"a message is {message!r:.100}, it must be a mapping with role and content"
        )
    plain = {name: value for name, value in plain.items() if value is not None}
    _check_message(plain)
    return plain


def _check_message(message: Mapping[str, Any]) -> None:
    """Templates read what they know and write what they are given: a slip would change the prompt in silence.

    Roles and fields of other names than the usual are for templates that know them.
    """
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(
            f"role of a message is {role!r:.100}, it must be {', '.join(ROLES[:-1])} or {ROLES[-1]}"
        )
    if role not in ROLES and (hint := did_you_mean(role, ROLES)):
        raise InvalidRequestError(f"role of a message is {role!r:.100}{hint}")
    for name in message.keys() - set(MESSAGE_FIELDS):
        if hint := did_you_mean(str(name), MESSAGE_FIELDS):
            raise InvalidRequestError(f"a message has the unknown field {name!r:.100}{hint}")
    if content is None and role in ROLES_THAT_SAY_SOMETHING:
        raise InvalidRequestError(f"the message of role {role!r} has no content, give it as text")
    if content is not None and not isinstance(content, str | list | tuple | dict):
        raise InvalidRequestError(f"content of a message is {content!r:.100}, it must be text")


def _plain(value: Any) -> Any:
    """A copy in JSON's own types: what else a caller passes in must not be reachable from a template."""
    if callable(
        getattr(value, "model_dump", None)
    ):  # pydantic's, such as the messages OpenAI's client returns
        value = value.model_dump()
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    for kind, plain in _SCALARS:
        if isinstance(value, kind):
            return plain(value)
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under any of its names is seen under those that templates read."""
    reasoning = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of calls that are JSON text, as answers have them, become objects, as templates want."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = past_arguments(str(function.get("name")), function["arguments"])
    return message


def _cut_at_mark(text: str, final: str) -> str:
    """As transformers cuts: where the template trims the message, the text ends without its spaces too."""
    end = text.rfind(_MARK.strip())
    if end < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message is set, but the chat template does not show the final message as it is"
        )
    return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()
