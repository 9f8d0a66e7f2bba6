"""The application: all routers, the error handlers, and the middleware around them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from loraserve._core import __version__
from loraserve.server.http import errors
from loraserve.server.http.admin.routes import router as admin
from loraserve.server.http.batches.routes import router as batches
from loraserve.server.http.dashboard.router import router as dashboard
from loraserve.server.http.messages.routes import router as messages
from loraserve.server.http.middleware import RequestIdMiddleware
from loraserve.server.http.openai.openapi import OpenAIError, Responses
from loraserve.server.http.openai.routes import router as openai
from loraserve.server.http.pooling.routes import router as pooling
from loraserve.server.http.responses.routes import router as responses
from loraserve.server.http.state import HttpState
from loraserve.server.http.tgi.openapi import TgiError
from loraserve.server.http.tgi.routes import router as tgi
from loraserve.server.http.tokens.routes import router as tokens

ADMIN_ERRORS: Responses = {
    status: {"model": OpenAIError | TgiError}
    for status in (400, 401, 403, 404, 409, 413, 415, 422, 429, 431, 503)
}
CORS_METHODS = ("GET", "POST", "PUT", "DELETE")
DESCRIPTION = """\
One base model and many LoRA adapters, mixed in one batch. Choose an adapter by `model` (OpenAI, Anthropic) or
by `parameters.adapter_id` (TGI, LoRAX). Every answer carries `X-Request-Id`.
"""


def create_app(state: HttpState) -> FastAPI:
    """All routes over one server's parts; CORS only where the state has origins."""
    # FastAPI's pages for the document would load scripts from elsewhere.
    app = FastAPI(
        title="loraserve", version=__version__, description=DESCRIPTION, docs_url=None, redoc_url=None
    )
    app.state.http = state
    app.include_router(openai)
    app.include_router(responses)
    app.include_router(messages)
    app.include_router(pooling)
    app.include_router(tgi)
    app.include_router(tokens)
    app.include_router(batches)
    app.include_router(admin, responses=ADMIN_ERRORS)
    app.include_router(dashboard)
    errors.install(app)
    app.add_middleware(RequestIdMiddleware)
    if state.cors_origins:
        # No credentials: a key comes in a header of its own, and nothing here reads cookies.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=state.cors_origins,
            allow_methods=CORS_METHODS,
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app
