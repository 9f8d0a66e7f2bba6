"""Bodies of every route that takes one, and what becomes of them with further fields."""

from __future__ import annotations

from typing import Any

import httpx
from loraserve.request import GenerateRequest

from tests.server.http.http_thread import HttpThread

CHAT = [{"role": "user", "content": "hi"}]
COMPLETION_ROUTE, CHAT_ROUTE = "/v1/completions", "/v1/chat/completions"
TGI_ROUTES = ("/generate", "/generate_stream", "/", "/invocations")
BODIES: dict[str, dict[str, Any]] = {
    COMPLETION_ROUTE: {"prompt": "x"},
    CHAT_ROUTE: {"messages": CHAT},
    **{path: {"inputs": "x"} for path in TGI_ROUTES},
    "/tokenize": {"inputs": "x"},
    "/adapters": {"name": "new", "source": "nowhere"},
    "/v1/load_lora_adapter": {"lora_name": "new", "lora_path": "nowhere"},
    "/v1/unload_lora_adapter": {"lora_name": "new"},
}


def asked(server: HttpThread, client: httpx.Client, path: str, **fields: Any) -> GenerateRequest:
    """What reaches the engine."""
    answer = client.post(path, json={**BODIES[path], **fields})
    assert answer.status_code == 200, answer.text
    request: GenerateRequest = server.engine.requests[-1]
    return request


def refusal(client: httpx.Client, path: str, /, **fields: Any) -> str:
    answer = client.post(path, json={**BODIES.get(path, {}), **fields})
    family = 422 if path in (*TGI_ROUTES, "/tokenize") else 400
    assert answer.status_code in (family, 404 if family == 400 else 422), answer.text
    error = answer.json()["error"]
    return str(error["message"] if isinstance(error, dict) else error)
