"""Bodies of Anthropic's routes as they arrive; ranges that the engine checks itself are left to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from loraserve.server.http.adapter_selectors import AdapterSelectors
from loraserve.server.http.foreign_fields import SELECTORS_ELSEWHERE
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
from loraserve.tools.tool import MAX_TOOLS

# Edits of the context that keep all of it, as Claude Code asks for them.
_ALL_THINKING_KEPT = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}


def _known_block(*kinds: str) -> BeforeValidator:
    """Refuses blocks of other types by name."""

    def check(block: Any) -> Any:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if isinstance(kind, str) and kind not in kinds:
            raise PydanticCustomError(
                "not_text",
                "a block of type {kind} is not supported here, where {kinds} are",
                {"kind": repr(kind)[:100], "kinds": ", ".join(kinds)},
            )
        return block

    return BeforeValidator(check)


class TextBlock(RequestBody):
    """Text."""

    no_effect: ClassVar[NoEffect] = frozenset({"cache_control"})
    neutral: ClassVar[Neutral] = {"citations": ([],), "parsed_output": ()}

    type: Literal["text"]
    text: Text


ResultText: TypeAlias = Annotated[TextBlock, _known_block("text")]


class ThinkingBlock(RequestBody):
    """Reasoning of an earlier answer; its signature is not looked at."""

    no_effect: ClassVar[NoEffect] = frozenset({"signature", "cache_control"})

    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(RequestBody):
    """A call that an earlier answer made."""

    no_effect: ClassVar[NoEffect] = frozenset({"cache_control", "caller"})
    neutral: ClassVar[Neutral] = {"toolset_name": ()}

    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(max_length=128)
    input: dict[str, Any]


class ToolResultBlock(RequestBody):
    """What a tool gave; whether that `is_error` is for its text to say."""

    no_effect: ClassVar[NoEffect] = frozenset({"cache_control", "is_error"})
    neutral: ClassVar[Neutral] = {"toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: Text | Annotated[list[ResultText], Field(max_length=MAX_TEXT_PARTS)] | None = None


def _own_tool(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if isinstance(kind, str) and kind != "custom":
        raise PydanticCustomError(
            "not_supported",
            "a tool of type {kind} is run or defined by Anthropic and not supported here, leave it out",
            {"kind": repr(kind)[:100]},
        )
    return tool


Block: TypeAlias = Annotated[
    Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")],
    _known_block("text", "thinking", "tool_use", "tool_result"),
]


class MessageParam(RequestBody):
    """A turn."""

    no_effect: ClassVar[NoEffect] = frozenset({"cache_control", "id"})

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], Field(max_length=MAX_TEXT_PARTS + MAX_CALLS)]


class ToolParam(RequestBody):
    """A function that the answer may call; `input_schema` is a JSON schema of an object."""

    no_effect: ClassVar[NoEffect] = frozenset({"cache_control", "eager_input_streaming"})
    neutral: ClassVar[Neutral] = {
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
        "input_examples": ([],),
    }
    elsewhere: ClassVar[Elsewhere] = {
        "parameters": "input_schema",
        "function": "its fields beside type",
    }

    name: str
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None


class ToolChoice(RequestBody):
    """`any` calls at least one tool, `tool` the one of `name`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, max_length=128)
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestBody):
    """`budget_tokens` is the most tokens of reasoning, after which its end is forced."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0)
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="`omitted` leaves the text of reasoning out of its blocks."
    )


class OutputFormat(RequestBody):
    """A JSON schema that the answer must satisfy."""

    no_effect: ClassVar[NoEffect] = frozenset({"name"})

    type: Literal["json_schema"]
    json_schema: dict[str, Any] | bool = Field(alias="schema")


class OutputConfig(RequestBody):
    """`effort` is the variable reasoning_effort of the chat template."""

    neutral: ClassVar[Neutral] = {"task_budget": ()}

    effort: ReasoningEffort | None = None
    format: OutputFormat | None = None


class Metadata(RequestBody):
    """Who asks."""

    user_id: str | None = Field(
        default=None,
        description="Whose request it is, up to 512 characters: of an adapter with shares the same user "
        "gets the same generation.",
    )


class ConversationBody(AdapterSelectors):
    """What a message is made of, and POST /v1/messages/count_tokens."""

    no_effect: ClassVar[NoEffect] = frozenset(
        {
            "cache_control",
            "service_tier",
            "inference_geo",
            "diagnostics",
            "user_profile_id",
            "workspace_id",
            "billing_policy",
            "fallback_credit_token",
        }
    )
    neutral: ClassVar[Neutral] = {
        "container": (),
        "compaction": (),
        "fallbacks": ([], "default"),
        "context_management": ({}, {"edits": []}, _ALL_THINKING_KEPT),
        "mcp_servers": ([],),
        "speed": ("standard",),
    }
    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | {
        "prompt": "messages",
        "input": "messages",
        "stop": "stop_sequences",
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "max_tokens_to_sample": "max_tokens",
        "instructions": "system",
        "functions": "tools",
        "response_format": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "betas": "the header anthropic-beta",
        "extra_body": "its fields beside it",
    }

    model: str | None = Field(
        default=None,
        max_length=1024,
        description="The base model, an adapter, or base:adapter; none is the base model.",
    )
    messages: Annotated[list[MessageParam], Field(fail_fast=True)]
    system: Text | Annotated[list[ResultText], Field(max_length=MAX_TEXT_PARTS)] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    metadata: Metadata | None = None
    thinking: Thinking | None = None
    tools: (
        Annotated[list[Annotated[ToolParam, BeforeValidator(_own_tool)]], Field(max_length=MAX_TOOLS)] | None
    ) = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thread: dict[str, Any] | None = Field(
        default=None, description="Refused so that Anthropic's client goes on without: no threads are kept."
    )
    output_format: OutputFormat | None = Field(default=None, description="The same as output_config.format.")
    seed: int | None = None
    speculate: bool | None = Field(
        default=None, description="False: no guesses ahead (`--speculate`); the answer is the same."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the chat template."
    )
    cache_salt: str | None = Field(
        default=None,
        description="1 to 256 characters: only requests of the same salt (and key) share cached prompts.",
    )


class MessagesBody(ConversationBody):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)
