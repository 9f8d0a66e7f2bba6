"""Bodies of OpenAI's routes as they arrive; ranges that the engine checks itself are left to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

MAX_TEXT_PARTS = 1024

Text: TypeAlias = Annotated[str, Field(max_length=16 * 2**20)]
TokenIds: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]


class _Body(BaseModel):
    """Fields that clients send and that change nothing here are taken and left alone."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class TextPart(_Body):
    type: Literal["text", "input_text", "refusal"] = "text"
    text: Text = ""


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS)] | None = None
    name: str | None = None


class JsonSchema(_Body):
    """`schema` is what the answer must satisfy."""

    name: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class ResponseFormat(_Body):
    """The form of the answer; "regex", "grammar" (Lark) and "choice" are loraserve's own."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice"]
    json_schema: JsonSchema | None = None
    json_object_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class StreamOptions(_Body):
    include_usage: bool = False


class GenerationBody(_Body):
    """What completions and chat completions share."""

    model: str | None = Field(
        default=None,
        max_length=1024,
        description="The base model, an adapter, or base:adapter; none is the base model.",
    )
    adapters: dict[str, float] | None = Field(
        default=None,
        description="Adapters and weights: their exact weighted sum. Only with the base model as `model`.",
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
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    n: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, description="Keep the last tokens only.")
    user: str | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Text | TokenIds | list[TokenIds] | list[Text]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatCompletionBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
