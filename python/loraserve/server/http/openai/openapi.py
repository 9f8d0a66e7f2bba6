"""What OpenAI's routes answer with, for the OpenAPI document; answers themselves are built without these."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

Responses: TypeAlias = dict[int | str, dict[str, Any]]


class _Document(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class OpenAIErrorFields(_Document):
    """What went wrong: `param` names a field of the request, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(_Document):
    """The body of every error under /v1."""

    error: OpenAIErrorFields


class Model(_Document):
    """The base model or an adapter. `parent` is the adapter's base, `root` is told to administrators only."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None
    parent: str | None
    max_model_len: int


class ModelList(_Document):
    """What the caller may use: names of the base model first, then adapters."""

    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(_Document):
    """Tokens of the prompt that came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(_Document):
    """Tokens of reasoning; tokens guessed ahead (`--speculate`): those that came, and those that did not."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageFields(_Document):
    """Token counts of all choices together; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Choice(_Document):
    """`text` in completions, `message` in chats: content, perhaps reasoning, perhaps calls."""

    index: int
    text: str | None = None
    message: dict[str, Any] | None = None
    logprobs: dict[str, Any] | None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]


class Answer(_Document):
    """Streamed as server-sent events of chunks where `stream` is true, ended by `data: [DONE]`."""

    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageFields
    system_fingerprint: str
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    service_tier: Literal["default"] | None = None


class Rendered(_Document):
    """A prompt as a request would get it, and how its answer would be sampled."""

    request_id: str
    model: str
    prompt: str
    token_ids: list[int]
    sampling_params: dict[str, Any]


EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
            "required": ["data"],
        }
    }
}
_ERROR: dict[str, Any] = {"model": OpenAIError}
_PROTECTED: Responses = {401: _ERROR, 403: _ERROR, 404: _ERROR}
MODELS_RESPONSES: Responses = {200: {"model": ModelList}, 401: _ERROR}
MODEL_RESPONSES: Responses = {200: {"model": Model}, 401: _ERROR, 404: _ERROR, 422: _ERROR}
_REFUSALS: Responses = {
    **_PROTECTED,
    **{status: _ERROR for status in (400, 408, 409, 413, 415, 422, 429, 503)},
}
GENERATION_RESPONSES: Responses = {200: {"model": Answer, "content": EVENTS}, **_REFUSALS}
RENDER_RESPONSES: Responses = {200: {"model": Rendered}, **_REFUSALS}
RENDER_ALL_RESPONSES: Responses = {200: {"model": list[Rendered]}, **_REFUSALS}
