"""Bodies of OpenAI's routes as they arrive; ranges that the engine checks itself are left to it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from loraserve.server.http.adapter_selectors import AdapterSelectors
from loraserve.server.http.foreign_fields import (
    CHAT_NEUTRAL,
    CHAT_NO_EFFECT,
    COMPLETION_NEUTRAL,
    COMPLETION_NO_EFFECT,
    OPENAI_ELSEWHERE,
    OPENAI_NEUTRAL,
    OPENAI_NO_EFFECT,
    OPENAI_REASONS,
    SELECTORS_ELSEWHERE,
)
from loraserve.server.http.request_body import (
    MAX_CALLS,
    MAX_TEXT_PARTS,
    Elsewhere,
    Neutral,
    NoEffect,
    ReasoningEffort,
    RequestBody,
    Text,
)
from loraserve.server.http.user import UserFields
from loraserve.tools.tool import MAX_TOOLS

TEXT_PART_TYPES = ("text", "input_text", "refusal")

TokenIds: TypeAlias = Annotated[
    list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, fail_fast=True)
]


def _not_zero(number: int) -> int:
    if number == 0:
        raise ValueError("give 1 or more, or -1 for as many as fit")
    return number


TruncatePromptTokens: TypeAlias = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]
"""vLLM's; -1 is as many as fit."""


Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
"""OpenAI's bounds: 16 pairs of text, keys of 64 characters, values of 512."""


class TextPart(RequestBody):
    """A part of a message's content; a type "refusal" has `refusal`, others have `text`."""

    no_effect: ClassVar[NoEffect] = frozenset({"cache_control"})

    type: Literal["text", "input_text", "refusal"] = "text"
    text: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, part: Any) -> Any:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXT_PART_TYPES:
            raise PydanticCustomError(
                "not_text",
                "a part of type {kind} is not supported, the model reads text only",
                {"kind": repr(kind)[:100]},
            )
        return part

    @model_validator(mode="after")
    def _check(self) -> TextPart:
        field = "refusal" if self.type == "refusal" and self.text is None else "text"
        if getattr(self, field) is None or (self.text is None) == (self.refusal is None):
            raise ValueError(
                f"a part of type {self.type!r} has {field} and nothing else, give it as a string"
            )
        return self

    @property
    def words(self) -> str:
        """What the part says, whichever field has it."""
        return self.text or self.refusal or ""


class MessageFunction(RequestBody):
    """A function that was called; `arguments` are JSON text, or the object."""

    no_effect: ClassVar[NoEffect] = frozenset({"description", "parameters", "strict"})

    name: str = Field(max_length=128)
    arguments: Text | dict[str, Any] | None = None


class MessageToolCall(RequestBody):
    """A call that an assistant's message made."""

    no_effect: ClassVar[NoEffect] = frozenset({"index", "caller"})

    id: str | None = Field(default=None, max_length=256)
    type: Literal["function"] = "function"
    function: MessageFunction


class FunctionBody(RequestBody):
    """A function that the answer may call; `parameters` is a JSON schema of an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None
    returns: Any = Field(default=None, alias="return", description="For the chat template.")


class ToolBody(RequestBody):
    """OpenAI's; functions only."""

    type: Literal["function"] = "function"
    function: FunctionBody

    @model_validator(mode="before")
    @classmethod
    def _has_function(cls, tool: Any) -> Any:
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            raise PydanticCustomError(
                "flat_tool",
                "a tool of a chat has name, description, parameters and strict in the object function, not "
                "beside type as in /v1/responses",
            )
        kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
        if kind != "function":
            raise PydanticCustomError(
                "not_supported",
                "a tool of type {kind} is not supported here, only functions are",
                {"kind": repr(kind)[:100]},
            )
        return tool


class Message(RequestBody):
    """`reasoning_content` and `tool_call_id` are for the chat template, if it reads them.

    A `function_call` is a tool call without an id, and role "function" is "tool".
    """

    no_effect: ClassVar[NoEffect] = frozenset({"cache_control", "id"})
    neutral: ClassVar[Neutral] = {
        "audio": (),
        "annotations": ([],),
        "reasoning_details": ([],),
        "thinking_blocks": ([],),
        "prefix": (False,),
        "partial": (False,),
    }
    elsewhere: ClassVar[Elsewhere] = {"text": "content", "message": "content", "from": "role"}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS)] | None = None
    refusal: Text | None = Field(default=None, description="What an answer said in place of content.")
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS)] | None = None
    function_call: MessageFunction | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = Field(default=None, description="The same as reasoning_content.")


class JsonSchema(RequestBody):
    """`schema` is what the answer must satisfy, strictly in any case."""

    no_effect: ClassVar[NoEffect] = frozenset({"strict", "description"})
    elsewhere: ClassVar[Elsewhere] = {"json_schema": "schema"}

    name: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class ResponseFormat(RequestBody):
    """The form of the answer; "grammar" (Lark) and "choice" are loraserve's own, `value` is TGI's."""

    no_effect: ClassVar[NoEffect] = frozenset({"strict"})

    type: Literal["text", "json_object", "json", "json_schema", "regex", "grammar", "choice"]
    json_schema: JsonSchema | None = None
    json_object_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    value: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class StructuredOutputs(RequestBody):
    """vLLM's; one of its fields."""

    neutral: ClassVar[Neutral] = {
        "disable_fallback": (False,),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    }

    json_form: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(RequestBody):
    """`include_usage` asks for a last chunk with the token counts."""

    no_effect: ClassVar[NoEffect] = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool | None = Field(
        default=None, description="vLLM's: with include_usage, counts so far in every chunk."
    )


class PredictionBody(RequestBody):
    """OpenAI's predicted output: a text that the answer is expected to repeat in large parts."""

    type: Literal["content"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS)]

    @property
    def text(self) -> str:
        """All of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.words for part in self.content)


class GenerationBody(AdapterSelectors, UserFields):
    """What completions and chat completions share."""

    no_effect: ClassVar[NoEffect] = OPENAI_NO_EFFECT
    neutral: ClassVar[Neutral] = OPENAI_NEUTRAL
    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | OPENAI_ELSEWHERE
    reasons = OPENAI_REASONS

    model: str | None = Field(
        default=None,
        max_length=1024,
        description="The base model, an adapter, or base:adapter; none is the base model.",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, description="0 or -1 keeps all.")
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    speculate: bool | None = Field(
        default=None, description="False: no guesses ahead (`--speculate`); the answer is the same."
    )
    min_tokens: int | None = None
    prompt_logprobs: int | None = Field(
        default=None, description="vLLM's: likeliest tokens beside each of the prompt's; not in a stream."
    )
    n: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    truncate_prompt_tokens: TruncatePromptTokens | None = Field(
        default=None, description="Keep the last tokens only; -1 keeps as many as fit."
    )
    prediction: PredictionBody | None = Field(
        default=None, description="What the answer will mostly repeat: it comes faster with `--speculate`."
    )
    metadata: Metadata | None = Field(default=None, description="Taken, and changes nothing here.")
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = Field(
        default=None, description="Whichever it is, the answer tells that it was default."
    )
    cache_salt: str | None = Field(
        default=None,
        description="1 to 256 characters: only requests of the same salt (and key) share cached prompts.",
    )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    no_effect: ClassVar[NoEffect] = OPENAI_NO_EFFECT | COMPLETION_NO_EFFECT
    neutral: ClassVar[Neutral] = OPENAI_NEUTRAL | COMPLETION_NEUTRAL
    elsewhere: ClassVar[Elsewhere] = GenerationBody.elsewhere | {
        "inputs": "prompt",
        "input": "prompt",
        "text": "prompt",
        "messages": "messages at /v1/chat/completions",
        "max_completion_tokens": "max_tokens",
        "top_logprobs": "logprobs",
    }

    prompt: (
        Text
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True)]
        | Annotated[list[Text], Field(fail_fast=True)]
    )
    suffix: Text | None = Field(
        default=None, description="What stands behind the answer; needs a model that fills in the middle."
    )
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatCompletionBody(GenerationBody):
    """POST /v1/chat/completions."""

    no_effect: ClassVar[NoEffect] = OPENAI_NO_EFFECT | CHAT_NO_EFFECT
    neutral: ClassVar[Neutral] = OPENAI_NEUTRAL | CHAT_NEUTRAL
    elsewhere: ClassVar[Elsewhere] = GenerationBody.elsewhere | {
        "inputs": "messages",
        "input": "messages",
        "prompt": "messages",
        "conversation": "messages",
        "template": "chat_template",
        "best_of": "n",
    }

    messages: Annotated[list[Message], Field(fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = Field(
        default=None, description="Begin the assistant's message; true unless the final message is continued."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Go on with the last message in place of a new one."
    )
    chat_template: str | None = Field(
        default=None, description="Jinja; only where the server has --trust-request-chat-template."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the chat template."
    )
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] | None = Field(
        default=None, description="Functions that the answer may call."
    )
    tool_choice: str | dict[str, Any] | None = Field(
        default=None, description="none, auto, required, a function, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="False allows one call an answer.")
    functions: Annotated[list[FunctionBody], Field(max_length=MAX_TOOLS)] | None = Field(
        default=None, description="The older form of tools; answers have function_call."
    )
    function_call: str | dict[str, Any] | None = Field(default=None, description="Of functions.")
    reasoning_effort: ReasoningEffort | None = Field(
        default=None, description="The variable reasoning_effort of the chat template."
    )
    enable_thinking: bool | None = Field(
        default=None, description="The variable enable_thinking of the chat template."
    )
    thinking: bool | dict[str, Any] | None = Field(
        default=None, description="The variable thinking of the chat template; also {type: enabled}."
    )
    include_reasoning: bool | None = Field(
        default=None, description="False leaves reasoning out of the answer."
    )
    thinking_token_budget: int | None = Field(
        default=None, ge=0, description="Most tokens of reasoning, after which its end is forced."
    )
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="For a chat template that reads documents."
    )
