"""OpenAI's `model` field: the base model, an adapter, or base:adapter; and what models there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from loraserve.adapters.registry import registered_name
from loraserve.request import AdapterSpec
from loraserve.server.access.keys import Caller
from loraserve.server.http.state import HttpState

# What clients of servers with one model send: text_generation's chat, huggingface_hub's InferenceClient.
PLACEHOLDER_MODELS = ("tgi", "dummy")


def adapter_in_model(state: HttpState, model: str | None) -> str | None:
    """The adapter that `model` names, None for the base model; whether it exists, the engine says."""
    if model is None or model in state.served_names or is_placeholder(state, model):
        return None
    for name in state.served_names:
        if model.startswith(f"{name}:"):
            return registered_name(model[len(name) + 1 :])
    return registered_name(model)


def is_placeholder(state: HttpState, model: str) -> bool:
    """Whether `model` stands for whatever model there is; an adapter that has such a name is meant by it."""
    return model in PLACEHOLDER_MODELS and all(one.name != model for one in state.engine.adapters())


def answering_model(state: HttpState, model: str | None, adapter: AdapterSpec) -> str:
    """As the client named it, unless another field chose an adapter or it named no model in particular."""
    if model is not None and model not in state.served_names and not is_placeholder(state, model):
        return model
    if isinstance(adapter, str):
        return adapter
    return model if model in state.served_names else state.served_names[0]


def models_for(state: HttpState, caller: Caller) -> Iterator[dict[str, Any]]:
    """Entries of /v1/models: the base model's names and what the caller may use, fetched or to be fetched."""
    base = state.served_names[0]
    if caller.may_use(None):
        root = state.engine.info().model if caller.sees_paths else None
        yield from (_model(state, name, root=root, parent=None) for name in state.served_names)
    registered = set()
    for adapter in state.engine.adapters():
        registered.add(adapter.name)
        if caller.may_use(adapter.name):
            root = adapter.path if caller.sees_paths else None
            yield _model(state, adapter.name, root=root, parent=base)
    for name in () if state.resolver is None else state.resolver.names:
        if name not in registered and caller.may_use(name):
            yield _model(state, name, root=None, parent=base)


def anthropic_model(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `models_for` as Anthropic's clients read it."""
    return {
        "type": "model",
        "id": entry["id"],
        "display_name": entry["id"],
        "created_at": datetime.fromtimestamp(entry["created"], timezone.utc).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": entry["max_model_len"],
    }


def _model(state: HttpState, name: str, *, root: str | None, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "loraserve",
        "root": root,
        "parent": parent,
        "max_model_len": state.max_model_len,
    }
