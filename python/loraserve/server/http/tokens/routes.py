"""/tokenize, of a text or a chat, and /detokenize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Body, Depends
from fastapi.responses import Response

from loraserve.errors import InvalidRequestError
from loraserve.request import AdapterSpec
from loraserve.server.access.keys import Caller
from loraserve.server.http.adapter_selectors import adapter_of
from loraserve.server.http.call import Call, current_call
from loraserve.server.http.json_route import JsonRoute
from loraserve.server.http.openai.request import chat_request
from loraserve.server.http.state import HttpState
from loraserve.server.http.tgi.schema import Parameters, TokenizeBody
from loraserve.server.http.tokens.openapi import DETOKENIZE_RESPONSES, TOKENIZE_RESPONSES
from loraserve.server.http.tokens.schema import (
    AnyTokenizeBody,
    DetokenizeBody,
    TokenizeChatBody,
    TokenizeTextBody,
)
from loraserve.text.tokenizer import Tokenizer

router = APIRouter(tags=["Tokens"], route_class=JsonRoute)


@router.post("/tokenize", responses=TOKENIZE_RESPONSES)
async def tokenize(
    body: Annotated[AnyTokenizeBody, Body()], call: Annotated[Call, Depends(current_call)]
) -> Response:
    """The tokens of a text or a chat, as an adapter has them; of `inputs` (TGI) with their characters."""
    if isinstance(body, TokenizeChatBody):
        return await _of_chat(body, call)
    if isinstance(body, TokenizeTextBody):
        return await _of_text(body, call)
    return await _of_inputs(body, call)


@router.post("/detokenize", responses=DETOKENIZE_RESPONSES)
async def detokenize(body: DetokenizeBody, call: Annotated[Call, Depends(current_call)]) -> Response:
    """The text of tokens."""
    tokenizer = _tokenizer(call.state, call.caller, adapter_of(call.state, call.caller, body.model, body))
    answer = await call.state.tokenizations.run(_text, tokenizer, body.tokens)
    return Response(answer, media_type="application/json")


async def _of_chat(body: TokenizeChatBody, call: Call) -> Response:
    request = chat_request(call, body)
    (prepared,) = await call.state.runner.prepared([request], call.caller)
    ids, tokenizer = prepared.prompt_token_ids, prepared.tokenizer
    return _tokenized(call.state, tokenizer, ids, wants_names=bool(body.return_token_strs))


async def _of_text(body: TokenizeTextBody, call: Call) -> Response:
    state = call.state
    tokenizer = _tokenizer(state, call.caller, adapter_of(state, call.caller, body.model, body))
    ids = await state.tokenizations.run(_ids, state, tokenizer, body.prompt, body.add_special_tokens)
    return _tokenized(state, tokenizer, ids, wants_names=bool(body.return_token_strs))


async def _of_inputs(body: TokenizeBody, call: Call) -> Response:
    state, parameters = call.state, body.parameters or Parameters()
    tokenizer = _tokenizer(state, call.caller, adapter_of(state, call.caller, None, body, parameters))
    answer = await state.tokenizations.run(
        _spans, state, tokenizer, body.inputs, body.add_special_tokens, parameters.truncate
    )
    return Response(answer, media_type="application/json")


def _tokenizer(state: HttpState, caller: Caller, adapter: AdapterSpec) -> Tokenizer:
    """Raises LoraserveError: there is no such adapter, or the caller may not use it."""
    if adapter is None:
        return state.engine.tokenizer
    caller.check_use(adapter)
    return state.engine.tokenizer_for(adapter)


def _tokenized(state: HttpState, tokenizer: Tokenizer, ids: Sequence[int], *, wants_names: bool) -> Response:
    names = [tokenizer.vocabulary_name(token_id) for token_id in ids] if wants_names else None
    fields: dict[str, Any] = {"count": len(ids), "max_model_len": state.max_model_len}
    content = orjson.dumps({**fields, "tokens": list(ids), "token_strs": names})
    return Response(content, media_type="application/json")


def _ids(state: HttpState, tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """For long texts slow, so not for the loop."""
    tokenizer.check_fits(text, state.max_model_len, "prompt")
    ids = tokenizer.encode(text, add_special_tokens)
    _check_length(state, len(ids), "prompt")
    return ids


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    unknown = next((token_id for token_id in ids if token_id >= tokenizer.vocab_size), None)
    if unknown is not None:
        raise InvalidRequestError(
            f"tokens has {unknown}, the vocabulary has {tokenizer.vocab_size} tokens, from 0"
        )
    return orjson.dumps({"prompt": tokenizer.decode(ids, skip_special_tokens=False)})


def _spans(
    state: HttpState, tokenizer: Tokenizer, text: str, add_special_tokens: bool, truncate: int | None
) -> bytes:
    """TGI's answer."""
    tokenizer.check_fits(text, state.max_model_len, "inputs")
    spans = tokenizer.encode_with_offsets(text, add_special_tokens)
    _check_length(state, len(spans), "inputs")
    texts = state.texts_of(tokenizer)
    return orjson.dumps(
        [
            {"id": token_id, "text": text[start:stop] or texts.text(token_id)}
            | {"start": start, "stop": stop}
            for token_id, start, stop in (spans if truncate is None else spans[-truncate:])
        ]
    )


def _check_length(state: HttpState, num_tokens: int, what: str) -> None:
    if num_tokens > state.max_model_len:
        raise InvalidRequestError(
            f"{what} has {num_tokens} tokens, the limit is {state.max_model_len}: the context length"
        )
