"""Bodies of the routes of responses as they arrive; ranges that the engine checks itself are left to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from loraserve.server.http.adapter_selectors import AdapterSelectors
from loraserve.server.http.foreign_fields import SELECTORS_ELSEWHERE
from loraserve.server.http.request_body import (
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

MAX_ID_CHARS = 256
MAX_METADATA = 16
ENCRYPTED_REASONING = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")
PART_TYPES = ("input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text")

Id: TypeAlias = Annotated[str, Field(max_length=MAX_ID_CHARS)]


def _text_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind not in PART_TYPES:
        raise PydanticCustomError(
            "not_text",
            "a part of type {kind} is not supported, the model reads text only",
            {"kind": repr(kind)[:100]},
        )
    return part


def _known_item(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "item_reference":
        raise PydanticCustomError(
            "not_supported",
            "references to items are not supported, send the items or previous_response_id",
            {},
        )
    if isinstance(kind, str) and kind not in ITEM_TYPES:
        raise PydanticCustomError(
            "not_supported",
            "an item of type {kind} is not supported here, {kinds} are",
            {"kind": repr(kind)[:100], "kinds": ", ".join(ITEM_TYPES)},
        )
    return item


def _item_type(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, Mapping) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


def _function_tool(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "not_supported",
            "a tool of type {kind} is not supported here, only functions are: leave it out",
            {"kind": repr(kind)[:100]},
        )
    return tool


class TextPart(RequestBody):
    """Text; a type "refusal" has `refusal`, others have `text`."""

    no_effect: ClassVar[NoEffect] = frozenset(
        {"annotations", "logprobs", "parsed", "prompt_cache_breakpoint"}
    )

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> TextPart:
        field = "refusal" if self.type == "refusal" else "text"
        if getattr(self, field) is None or (self.text is None) == (self.refusal is None):
            raise ValueError(f"a part of type {self.type} has {field} and nothing else, give it as a string")
        return self

    @property
    def words(self) -> str:
        """What the part says, whichever field has it."""
        return self.text or self.refusal or ""


Parts: TypeAlias = Annotated[
    list[Annotated[TextPart, BeforeValidator(_text_part)]], Field(max_length=MAX_TEXT_PARTS)
]


class MessageItem(RequestBody):
    """A message, of an input or of an answer."""

    no_effect: ClassVar[NoEffect] = frozenset({"status", "phase"})

    type: Literal["message"] = "message"
    id: Id | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts


class FunctionCallItem(RequestBody):
    """A call that an answer made; `arguments` are JSON text, or what there is of it."""

    no_effect: ClassVar[NoEffect] = frozenset({"caller", "parsed_arguments"})
    neutral: ClassVar[Neutral] = {"async": (False,), "namespace": ()}

    type: Literal["function_call"]
    id: Id | None = None
    call_id: Id
    name: str = Field(max_length=128)
    arguments: Text
    status: Literal["in_progress", "completed", "incomplete"] | None = Field(
        default=None, description="An incomplete call needs no output."
    )


class FunctionOutputItem(RequestBody):
    """What a function gave."""

    no_effect: ClassVar[NoEffect] = frozenset({"status", "caller"})

    type: Literal["function_call_output"]
    id: Id | None = None
    call_id: Id
    output: Text | Parts


class ReasoningItem(RequestBody):
    """Reasoning of an answer: `content`, or else what `encrypted_content` holds, or else `summary`."""

    no_effect: ClassVar[NoEffect] = frozenset({"status"})

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Parts = Field(default_factory=list)
    content: Parts | None = None
    encrypted_content: Text | None = None


Item: TypeAlias = Annotated[
    Annotated[
        Annotated[MessageItem, Tag("message")]
        | Annotated[FunctionCallItem, Tag("function_call")]
        | Annotated[FunctionOutputItem, Tag("function_call_output")]
        | Annotated[ReasoningItem, Tag("reasoning")],
        Discriminator(_item_type),
    ],
    BeforeValidator(_known_item),
]


class FunctionTool(RequestBody):
    """A function that the answer may call; `parameters` is a JSON schema of an object."""

    no_effect: ClassVar[NoEffect] = frozenset({"output_schema"})
    neutral: ClassVar[Neutral] = {
        "async": (False,),
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
    }
    elsewhere: ClassVar[Elsewhere] = {"function": "its fields beside type", "input_schema": "parameters"}

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(RequestBody):
    """The form of the answer's text; `schema` is of a json_schema, and strict in any case."""

    no_effect: ClassVar[NoEffect] = frozenset({"strict", "description"})

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("schema is of type json_schema, and needed there")
        return self


class TextConfig(RequestBody):
    """`format` is the form of the text."""

    neutral: ClassVar[Neutral] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class Reasoning(RequestBody):
    """`effort` is the variable reasoning_effort of the chat template; there are no summaries."""

    no_effect: ClassVar[NoEffect] = frozenset({"summary", "generate_summary"})
    neutral: ClassVar[Neutral] = {"context": ("auto",), "mode": ("standard",)}

    effort: ReasoningEffort | None = None


class ResponseStreamOptions(RequestBody):
    """Taken and not used."""

    no_effect: ClassVar[NoEffect] = frozenset({"include_obfuscation"})


class ConversationBody(AdapterSelectors, UserFields):
    """What a response's prompt is made of, and POST /v1/responses/input_tokens."""

    no_effect: ClassVar[NoEffect] = frozenset(
        {
            "service_tier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "client_metadata",
            "max_tool_calls",  # of tools that run at OpenAI
        }
    )
    neutral: ClassVar[Neutral] = {
        "background": (False,),
        "background_options": ({},),
        "conversation": (),
        "prompt": (),
        "truncation": ("disabled",),
        "context_management": ([],),
        "moderation": (),
        "image": (),
        "access_programs": (),
        "personality": (),
    }
    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | {
        "messages": "input",
        "system": "instructions",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text.format",
        "reasoning_effort": "reasoning.effort",
        "verbosity": "text.verbosity",
        "functions": "tools",
        "logprobs": "top_logprobs",
        "n": "a request for each answer",
        "extra_body": "its fields beside it",
    }

    model: str | None = Field(
        default=None,
        max_length=1024,
        description="The base model, an adapter, or base:adapter; none is the base model.",
    )
    input: Text | Annotated[list[Item], Field(fail_fast=True)] | None = None
    instructions: Text | None = None
    previous_response_id: Id | None = None
    tools: Annotated[
        list[Annotated[FunctionTool, BeforeValidator(_function_tool)]] | None, Field(max_length=MAX_TOOLS)
    ] = None
    tool_choice: str | dict[str, Any] | None = Field(
        default=None, description="none, auto, required, a function, or allowed_tools."
    )
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the chat template."
    )
    cache_salt: str | None = Field(
        default=None,
        description="1 to 256 characters: only requests of the same salt (and key) share cached prompts.",
    )


class ResponsesBody(ConversationBody):
    """POST /v1/responses."""

    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = Field(
        default=None, description="False keeps nothing of the response; true unless given."
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = (
        Field(default=None, max_length=MAX_METADATA)
    )
    include: (
        list[
            Literal[
                "reasoning.encrypted_content",
                "message.output_text.logprobs",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ]
        | None
    ) = Field(default=None, max_length=64)
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    top_logprobs: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    seed: int | None = None
    thinking_token_budget: int | None = Field(
        default=None, ge=0, description="Most tokens of reasoning, after which its end is forced."
    )
    speculate: bool | None = Field(
        default=None, description="False: no guesses ahead (`--speculate`); the answer is the same."
    )
