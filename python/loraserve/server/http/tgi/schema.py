"""Bodies of TGI's and LoRAX' routes as they arrive; ranges that the engine checks itself are left to it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from loraserve.server.http.adapter_selectors import AdapterSelectors
from loraserve.server.http.foreign_fields import SELECTORS_ELSEWHERE, TGI_ELSEWHERE, TGI_NEUTRAL
from loraserve.server.http.openai.schema import ChatCompletionBody, CompletionBody
from loraserve.server.http.request_body import Elsewhere, Neutral, NoEffect, RequestBody, Text

Fraction: TypeAlias = Annotated[float, Field(gt=0, le=1)]


class GrammarField(RequestBody):
    """`value` is a JSON schema, {"schema": …}, or a regular expression."""

    type: Literal["json", "json_schema", "regex"]
    value: dict[str, Any] | bool | str


class LoraxFormat(RequestBody):
    """LoRAX' way to ask for JSON."""

    no_effect: ClassVar[NoEffect] = frozenset({"strict"})

    type: Literal["json_object"]
    json_object_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")


class Parameters(AdapterSelectors):
    """`parameters` of a generate request."""

    neutral: ClassVar[Neutral] = TGI_NEUTRAL
    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | TGI_ELSEWHERE

    best_of: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    repetition_penalty: float | None = Field(default=None, gt=0)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = Field(default=None, ge=1)
    top_p: Fraction | None = None
    typical_p: Fraction | None = None
    do_sample: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1)
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: list[str] = Field(default_factory=list)
    truncate: int | None = Field(default=None, ge=1)
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = Field(default=None, ge=0, le=2**64 - 1)
    top_n_tokens: int | None = Field(default=None, ge=0)
    return_k_alternatives: int | None = Field(default=None, ge=0)
    grammar: GrammarField | None = None
    response_format: LoraxFormat | None = None
    speculate: bool | None = Field(
        default=None, description="False: no guesses ahead (`--speculate`); the answer is the same."
    )
    cache_salt: str | None = Field(
        default=None,
        description="1 to 256 characters: only requests of the same salt (and key) share cached prompts.",
    )


class AnyGenerateBody(AdapterSelectors):
    """What /generate, /generate_stream and / share; `options` are those of Hugging Face's endpoints."""

    no_effect: ClassVar[NoEffect] = frozenset({"options"})
    neutral: ClassVar[Neutral] = {"add_special_tokens": (True,)}
    elsewhere: ClassVar[Elsewhere] = (
        SELECTORS_ELSEWHERE
        | {
            name: f"parameters.{name}"
            for name in Parameters.model_fields.keys() - AdapterSelectors.model_fields.keys()
        }
        | {name: f"parameters.{other}" for name, other in TGI_ELSEWHERE.items() if name != "stream"}
        | {"prompt": "inputs", "text": "inputs", "input": "inputs", "model": "parameters.adapter_id"}
    )

    inputs: Text
    parameters: Parameters | None = None


class GenerateBody(AnyGenerateBody):
    """POST /generate."""

    neutral: ClassVar[Neutral] = AnyGenerateBody.neutral | {"stream": (False,)}


class GenerateStreamBody(AnyGenerateBody):
    """POST /generate_stream."""

    neutral: ClassVar[Neutral] = AnyGenerateBody.neutral | {"stream": (True,)}


class CompatGenerateBody(AnyGenerateBody):
    """POST /: a stream or an array."""

    stream: bool | None = None


class TokenizeBody(AdapterSelectors):
    """POST /tokenize; of `parameters`, `truncate` keeps the last tokens; adapters may have their own."""

    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | {
        "prompt": "inputs",
        "text": "inputs",
        "content": "inputs",
    }

    inputs: Text
    parameters: Parameters | None = None
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
