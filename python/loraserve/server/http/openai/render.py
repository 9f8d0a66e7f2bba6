"""What a request would ask the engine, without asking it: vLLM's render routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loraserve.engine.prepared import PreparedRequest
from loraserve.sampling.grammar import Grammar


def rendered(request_id: str, model: str, prepared: PreparedRequest) -> dict[str, Any]:
    """The prompt's text (special tokens by their names) and tokens, and how an answer would be sampled.

    Of a long prompt it takes some milliseconds, and so is not for the loop.
    """
    ids, params = prepared.prompt_token_ids, prepared.params
    return {
        "request_id": request_id,
        "model": model,
        "prompt": prepared.tokenizer.decode(ids, skip_special_tokens=False),
        "token_ids": list(ids),
        "sampling_params": {one.name: _plain(getattr(params, one.name)) for one in fields(params)},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Grammar):
        return {"kind": value.kind, "value": value.value}
    return {str(key): one for key, one in value.items()} if isinstance(value, Mapping) else value
