"""A server without an engine that answers all the dashboard asks; its state is the test's to change."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from loraserve.server.http.dashboard.router import router

KEY = "test-key"
BASE = "tiny-llama"
RESULTS = {
    "compared": 200,
    "identical": 150,
    "ending_alike": 190,
    "agreement": 0.9,
    "tokens": 4000,
    "shadow_tokens": 4100,
    "seconds": 20.0,
    "shadow_seconds": 21.0,
    "errors": 1,
    "dropped": 7,
}
TOKEN_S = 0.01
ENDLESS_TOKEN_S = 0.05  # a busy machine's browser still has time for the rest of the page
POLL_S = 0.01


class FakeDashboardServer:
    """Adapters by name, as GET /adapters lists them; with `needs_key`, only KEY is answered."""

    def __init__(self, names: list[str], *, needs_key: bool = False) -> None:
        self.adapters = {name: adapter(name, rank=8 * (index + 1)) for index, name in enumerate(names)}
        self.generations = [generation(1, kept=False), generation(2), generation(3, current=True)]
        self.traffic: dict[str, dict[str, Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.needs_key = needs_key
        self.may_load = threading.Event()  # a load stops half-way until it is set
        self.may_load.set()
        self.is_admin = True
        self.stats = {
            "running": 3,
            "waiting": 2,
            "tokens_per_s": 123.0,
            "page_nbytes": 65536,
            "pages": {"kv": 300, "cached": 150, "adapters": 90, "free": 460},
        }

    def app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        app.include_router(router)
        app.middleware("http")(self._check_key)
        app.get("/dashboard/stats")(self._stats)
        app.get("/info")(self._info)
        app.get("/v1/models")(self._models)
        app.post("/v1/completions")(self._generate)
        app.post("/v1/chat/completions")(self._generate)
        app.get("/adapters")(self._list)
        app.post("/adapters")(self._load)
        app.delete("/adapters/{name}")(self._unload)
        app.put("/adapters/{name}/pin")(self._pin)
        app.post("/adapters/{name}/warm")(self._warm)
        app.get("/adapters/{name}/generations")(self._generations)
        app.put("/adapters/{name}/shares")(self._share)
        app.post("/adapters/{name}/rollback")(self._roll_back)
        app.put("/adapters/{name}/shadow")(self._shadow)
        app.delete("/adapters/{name}/shadow")(self._end_shadow)
        return app

    async def _check_key(self, request: Request, call_next: Any) -> Response:
        path = request.url.path
        is_page = path == "/" or path.startswith("/dashboard/static/")
        if self.needs_key and not is_page and request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": "the key is missing or unknown"}, 401)
        response: Response = await call_next(request)
        return response

    async def _stats(self) -> dict[str, Any]:
        return {**self.stats, "is_admin": self.is_admin, "adapters": self.traffic}

    async def _info(self) -> dict[str, Any]:
        return {"model_id": BASE, "dtype": "float32", "device": "cpu", "version": "0.1.0"}

    async def _models(self) -> dict[str, Any]:
        models = [{"id": BASE, "parent": None}] + [{"id": name, "parent": BASE} for name in self.adapters]
        return {"object": "list", "data": models}

    async def _list(self) -> dict[str, Any]:
        return {"adapters": list(self.adapters.values())}

    async def _generate(self, body: Annotated[dict[str, Any], Body()]) -> Response:
        self.requests.append(body)
        return _event_stream(self._answer(body))

    async def _answer(self, body: dict[str, Any]) -> AsyncIterator[str]:
        is_chat = "messages" in body
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        if prompt == "fail":
            yield _event({"error": {"message": "the adapter is gone"}})
            return
        words = [body["model"], "says:", *prompt.split()]
        num_tokens = 10_000 if prompt == "endless" else len(words)
        for index in range(num_tokens):
            await asyncio.sleep(ENDLESS_TOKEN_S if prompt == "endless" else TOKEN_S)
            text = words[index % len(words)] + " "
            delta = {"delta": {"content": text}} if is_chat else {"text": text}
            yield _event({"choices": [{"index": 0, **delta, "finish_reason": None}]})
        yield _event(
            {
                "choices": [
                    {"index": 0, **({"delta": {}} if is_chat else {"text": ""}), "finish_reason": "stop"}
                ]
            }
        )
        yield _event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": num_tokens}})
        yield "data: [DONE]\n\n"

    async def _load(self, body: Annotated[dict[str, Any], Body()]) -> Response:
        return _event_stream(self._progress(body))

    async def _progress(self, body: dict[str, Any]) -> AsyncIterator[str]:
        total = 4 * 2**20
        for quarter in range(5):
            while quarter == 3 and not self.may_load.is_set():
                await asyncio.sleep(POLL_S)
            done = {"stage": "downloading", "done_bytes": total * quarter // 4, "total_bytes": total}
            yield _event(done, "progress")
            if quarter == 2 and body["source"] == "missing":
                yield _event({"error": "no folder 'missing' under /adapters"}, "error")
                return
        self.adapters[body["name"]] = adapter(body["name"], rank=16) | {"pinned": body["pin"]}
        yield _event(self.adapters[body["name"]], "loaded")

    async def _unload(self, name: str) -> Response:
        del self.adapters[name]
        return Response(status_code=204)

    async def _pin(self, name: str, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        self.adapters[name]["pinned"] = body["pinned"]
        return self.adapters[name]

    async def _warm(self, name: str) -> dict[str, Any]:
        self.adapters[name]["state"] = "resident"
        return {"seconds": 0.5}

    async def _generations(self, name: str) -> Response:
        return JSONResponse({"generations": self.generations})

    async def _share(self, name: str, body: Annotated[dict[str, Any], Body()]) -> Response:
        shares = {int(number): share for number, share in body["shares"].items()}
        if abs(sum(shares.values()) - 1) > 1e-9:
            text = f"shares of adapter {name!r} sum to {sum(shares.values()):g}, they must sum to 1"
            return JSONResponse({"error": text}, 400)
        for one in self.generations:
            one["share"] = shares.get(one["number"], 0.0)
        return await self._generations(name)

    async def _roll_back(self, name: str, body: Annotated[dict[str, Any], Body()]) -> Response:
        current = body.get("generation", 1)
        for one in self.generations:
            one["current"], one["share"] = one["number"] == current, float(one["number"] == current)
        return await self._generations(name)

    async def _shadow(self, name: str, body: Annotated[dict[str, Any], Body()]) -> Response:
        self.generations[body["generation"] - 1]["shadow"] = {**RESULTS, "fraction": body["fraction"]}
        return await self._generations(name)

    async def _end_shadow(self, name: str) -> Response:
        for one in self.generations:
            if one["shadow"] is not None:
                one["shadow"]["fraction"] = 0.0
        return await self._generations(name)


class DashboardThread:
    """Serves `make_app()` on a free port of 127.0.0.1 until the `with` block ends; `url` ends with a slash.

    The app is made on the loop that serves it, and `stop` is awaited there at the end.
    """

    def __init__(
        self, make_app: Callable[[], FastAPI], stop: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._make_app, self._stop = make_app, stop
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._should_exit = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="test-dashboard")

    async def _serve(self) -> None:
        config = uvicorn.Config(self._make_app(), log_level="error", lifespan="off", ws="none")
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        await asyncio.to_thread(self._should_exit.wait)
        server.should_exit = True
        await serving
        if self._stop is not None:
            await self._stop()

    def __enter__(self) -> DashboardThread:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._should_exit.set()
        self._thread.join()


def generation(number: int, *, current: bool = False, kept: bool = True) -> dict[str, Any]:
    return {
        "number": number,
        "hash": f"{number}" * 64,
        "source": f"/adapters/sql-v{number}",
        "since": 1.75e9 + number,
        "current": current,
        "kept": kept,
        "share": float(current),
        "requests": 40 * number,
        "shadow": None,
    }


def adapter(name: str, *, rank: int, state: str = "resident") -> dict[str, Any]:
    return {
        "name": name,
        "generation": 3,
        "path": f"/adapters/{name}",
        "state": state,
        "rank": rank,
        "nbytes": rank * 2**18,
        "pinned": False,
        "requests": 0,
        "tokens": 0,
        "description": None,
        "last_load_s": None,
        "receipt": {
            "tensors": 56,
            "modules": ["q_proj", "v_proj"],
            "layers": [0, 1, 2, 3],
            "ranks": [rank],
            "base_check": "shapes",
            "base_model": BASE,
            "base_copies": [],
            "notes": [],
            "not_used": [],
        },
    }


def _event(data: dict[str, Any], event: str | None = None) -> str:
    name = f"event: {event}\n" if event is not None else ""
    return f"{name}data: {json.dumps(data)}\n\n"


def _event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream")
