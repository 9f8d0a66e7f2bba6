"""Bodies of /tokenize and /detokenize as they arrive."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Discriminator, Field, Tag

from loraserve.server.http.adapter_selectors import AdapterSelectors
from loraserve.server.http.foreign_fields import SELECTORS_ELSEWHERE
from loraserve.server.http.openai.schema import ChatCompletionBody, TokenIds
from loraserve.server.http.request_body import Elsewhere, Text
from loraserve.server.http.tgi.schema import TokenizeBody


class TokenizeTextBody(AdapterSelectors):
    """POST /tokenize of a text, vLLM's form."""

    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | {"text": "prompt", "content": "prompt"}

    model: str | None = Field(default=None, max_length=1024)
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatBody(ChatCompletionBody):
    """POST /tokenize of a chat, vLLM's form: as the chat template and the request's tools make its prompt."""

    return_token_strs: bool | None = None


class DetokenizeBody(AdapterSelectors):
    """POST /detokenize."""

    elsewhere: ClassVar[Elsewhere] = SELECTORS_ELSEWHERE | dict.fromkeys(
        ("ids", "token_ids", "prompt"), "tokens"
    )

    model: str | None = Field(default=None, max_length=1024)
    tokens: TokenIds


def _kind_of(body: Any) -> str:
    fields = body if isinstance(body, dict) else {}
    if "messages" in fields:
        return "chat"
    return "text" if "prompt" in fields else "tgi"


AnyTokenizeBody: TypeAlias = Annotated[
    Annotated[TokenizeBody, Tag("tgi")]
    | Annotated[TokenizeTextBody, Tag("text")]
    | Annotated[TokenizeChatBody, Tag("chat")],
    Discriminator(_kind_of),
]
