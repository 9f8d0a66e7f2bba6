"""The HTTP application over a model in this process, without a listener: what answers a batch's lines."""

from __future__ import annotations

from dataclasses import replace

from fastapi import FastAPI

from loraserve.async_engine import AsyncEngine
from loraserve.config import EngineConfig
from loraserve.server.access.keys import AccessControl
from loraserve.server.http.app import create_app
from loraserve.server.http.state import HttpState
from loraserve.server.observe.metrics import Metrics


def application(config: EngineConfig, served_names: tuple[str, ...]) -> tuple[AsyncEngine, FastAPI]:
    """The engine, which is the caller's to shut down, and the routes over it.

    Raises:
        LoraserveError: the model or an adapter can't be loaded.
    """
    engine = AsyncEngine(replace(config, base_names=served_names, max_waiting=None))
    state = HttpState(
        engine=engine, served_names=served_names, access=AccessControl.open(), metrics=Metrics()
    )
    return engine, create_app(state)
