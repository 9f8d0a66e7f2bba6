"""OpenAI's `model` field: the base model, an adapter, or base:adapter; beside it `adapters` for a sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loraserve.errors import InvalidRequestError
from loraserve.request import AdapterSpec
from loraserve.server.http.state import HttpState
from loraserve.server.keys import Caller


def adapter_of(
    model: str | None, adapters: Mapping[str, float] | None, served_names: Sequence[str]
) -> AdapterSpec:
    """The adapter that `model` and `adapters` mean; whether it exists, the engine says.

    Raises:
        InvalidRequestError: both name one.
    """
    named = _adapter_in(model, served_names)
    if not adapters:
        return named
    if named is not None:
        raise InvalidRequestError(
            f"model names adapter {named!r:.200} and adapters names {len(adapters)} more, "
            f"set model to {served_names[0]!r} to use adapters"
        )
    return {registered_name(name): weight for name, weight in adapters.items()}


def _adapter_in(model: str | None, served_names: Sequence[str]) -> str | None:
    if model is None or model in served_names:
        return None
    for name in served_names:
        if model.startswith(f"{name}:"):
            return registered_name(model[len(name) + 1 :])
    return registered_name(model)


def registered_name(name: str) -> str:
    """Names have no "/": an adapter of the Hub, `owner/name`, is registered as `owner-name`."""
    return name.replace("/", "-")


def models_for(state: HttpState, caller: Caller) -> Iterator[dict[str, Any]]:
    """Entries of /v1/models: the base model's names and the adapters this caller may use."""
    base = state.served_names[0]
    if caller.may_use(None):
        root = state.engine.info().model
        yield from (_model(state, name, root=root, parent=None) for name in state.served_names)
    for adapter in state.engine.adapters():
        if caller.may_use(adapter.name):
            yield _model(state, adapter.name, root=adapter.path, parent=base)


def _model(state: HttpState, name: str, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "loraserve",
        "root": root,
        "parent": parent,
        "max_model_len": state.max_model_len,
    }
