"""Bodies of TGI's and LoRAX' routes as they arrive; ranges that the engine checks itself are left to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from loraserve.server.http.openai_schema import ChatCompletionBody, CompletionBody, Text

Fraction: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class GrammarField(_Body):
    """`value` is a JSON schema, {"schema": …}, or a regular expression."""

    type: Literal["json", "json_schema", "regex"]
    value: dict[str, Any] | bool | str


class LoraxFormat(_Body):
    """LoRAX' way to ask for JSON."""

    type: Literal["json_object"]
    json_object_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class MergedAdapters(_Body):
    """A weighted sum of adapters: of their whole deltas, so that it has no cross terms."""

    ids: list[str] = Field(min_length=1)
    weights: list[float] = Field(min_length=1)
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: float | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None


class Parameters(_Body):
    """`parameters` of a generate request."""

    adapter_id: str | None = Field(default=None, max_length=1024)
    adapter_source: Literal["hub", "local", "s3", "pbase"] | None = None
    api_token: str | None = Field(
        default=None, description="Taken and not used: adapters are loaded already."
    )
    merged_adapters: MergedAdapters | None = None
    best_of: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: float | None = None
    top_k: int | None = Field(default=None, ge=1)
    top_p: Fraction | None = None
    typical_p: Fraction | None = None
    do_sample: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1)
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: list[str] = Field(default_factory=list)
    truncate: int | None = Field(default=None, ge=1)
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = Field(default=None, ge=0, le=2**64 - 1)
    top_n_tokens: int | None = Field(default=None, ge=0)
    return_k_alternatives: int | None = Field(default=None, ge=0)
    grammar: GrammarField | None = None
    response_format: LoraxFormat | None = None


class GenerateBody(_Body):
    """POST /generate and /generate_stream."""

    inputs: Text
    parameters: Parameters | None = None


class CompatGenerateBody(GenerateBody):
    """POST /: a stream or an array."""

    stream: bool | None = None


class TokenizeBody(_Body):
    """POST /tokenize; `parameters` are taken and mean nothing."""

    inputs: Text
    add_special_tokens: bool = True


def _kind_of_invocation(body: Any) -> str:
    fields = body if isinstance(body, dict) else {}
    if "messages" in fields:
        return "chat"
    return "completion" if "prompt" in fields else "generate"


InvocationBody: TypeAlias = Annotated[
    Annotated[CompatGenerateBody, Tag("generate")]
    | Annotated[CompletionBody, Tag("completion")]
    | Annotated[ChatCompletionBody, Tag("chat")],
    Discriminator(_kind_of_invocation),
]
