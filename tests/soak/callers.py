"""Who asks for answers: those who read them to the end, and those who behave in every other way."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import httpx
from loraserve import SamplingParams
from loraserve.client import AsyncClient
from loraserve.errors import LoraserveError

from tests.soak.report import Report
from tests.soak.server import Server
from tests.soak.world import GREEDY, NUM_TOKENS, SEED, SUM, Answer, World

ANSWER_S = 90.0  # no answer and no error for so long is a fault
# What a good request may get where much waits, and adapters come and go.
REFUSALS = {404: "no such adapter", 409: "adapter unavailable", 429: "too busy", 503: "stopping"}


@dataclass
class Soak:
    """What all callers share.

    Nobody changes adapters until the world `is_known`: what a server that starts tells of its adapters would
    come behind such a change, and be taken for what they are after it.
    """

    world: World
    server: Server
    report: Report
    draw: random.Random
    is_known: asyncio.Event = field(default_factory=asyncio.Event)

    def names(self) -> list[str | None]:
        """Whom to ask for; some are gone at times."""
        return [None, "sum", *self.world.versions]

    def question(self) -> tuple[str | None, int, int]:
        """(name, number of the prompt, tokens to generate)."""
        return (
            self.draw.choice(self.names()),
            self.draw.randrange(len(self.world.prompts)),
            self.draw.randint(1, NUM_TOKENS),
        )

    def body(self, name: str | None, prompt: int, num_tokens: int, **more: Any) -> dict[str, Any]:
        """Of a completion."""
        model = {"model": "tiny"} if name in (None, "sum") else {"model": name}
        if name == "sum":
            model = {"model": "tiny", "adapters": SUM}
        sampling = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        return {**model, "prompt": self.world.prompts[prompt], **sampling, **more}

    def judge(
        self, kind: str, question: tuple[str | None, int, int], since: float, said: Answer, **how: bool
    ) -> None:
        """Counts an answer as equal to the one computed alone, or as a fault."""
        name, prompt, _ = question
        if self.world.is_right(name, prompt, since, said, **how):
            self.report.add(kind, "equal")
        else:
            allowed = sorted(map(str, self.world.allowed(name, since)))
            last = self.world.versions.get(name or "", [])[-4:]
            fault = f"{name} prompt {prompt} sent at {since} said {said}, allowed are {allowed} of {last}"
            self.report.fault(kind, fault)

    def lost(self, kind: str, since: float, error: BaseException) -> None:
        """A connection ended: the server's absence, or a fault."""
        if self.server.was_away(since):
            self.report.add(kind, "server away")
        else:
            self.report.fault(kind, f"{type(error).__name__}: {error}")

    def refused(self, kind: str, response: httpx.Response, since: float) -> None:
        """A good request was refused, as it may be."""
        what = REFUSALS.get(response.status_code)
        if what is None or (response.status_code == 503 and not self.server.was_away(since)):
            self.report.fault(kind, f"{response.status_code} {response.text}")
        else:
            self.report.add(kind, f"{response.status_code} {what}")


Caller: TypeAlias = "Callable[[Soak, httpx.AsyncClient], Awaitable[None]]"


def whole_answer(response: httpx.Response, num_tokens: int) -> Answer:
    """Of a completion; nothing, if it has another number of tokens than were asked for."""
    body = response.json()
    is_whole = body["usage"]["completion_tokens"] == num_tokens
    return Answer((), body["choices"][0]["text"] if is_whole else "")


async def reads_all(soak: Soak, client: httpx.AsyncClient) -> None:
    """One answer, whole."""
    question, since = soak.question(), time.monotonic()
    response = await client.post("/v1/completions", json=soak.body(*question))
    if response.status_code == 200:
        soak.judge("reads all", question, since, whole_answer(response, question[2]))
    else:
        soak.refused("reads all", response, since)


async def streams(soak: Soak, client: httpx.AsyncClient) -> None:
    """One answer, as it comes."""
    question, since = soak.question(), time.monotonic()
    async with client.stream("POST", "/v1/completions", json=soak.body(*question, stream=True)) as response:
        if response.status_code != 200:
            await response.aread()
            soak.refused("streams", response, since)
            return
        text, last = "", ""
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                last = line.removeprefix("data: ")
                event = {} if last == "[DONE]" else json.loads(last)
                if "error" in event and soak.server.was_away(since):
                    soak.report.add("streams", "cut by the stop")
                    return
                text += event["choices"][0]["text"] if event.get("choices") else ""
    if last == "[DONE]":
        soak.judge("streams", question, since, Answer((), text))
    else:
        soak.report.fault("streams", f"ended with {last}")


async def samples(soak: Soak, client: httpx.AsyncClient) -> None:
    """One sampled answer of a seed, with logprobs."""
    question, since = soak.question(), time.monotonic()
    body = soak.body(*question) | {"temperature": 1, "top_p": 0.9, "seed": SEED, "logprobs": 2}
    response = await client.post("/v1/completions", json=body)
    if response.status_code == 200:
        soak.judge("samples", question, since, whole_answer(response, question[2]), sampled=True)
    else:
        soak.refused("samples", response, since)


async def over_grpc(soak: Soak, _: httpx.AsyncClient) -> None:
    """One answer over gRPC; some leave before its end."""
    question, since = soak.question(), time.monotonic()
    name, prompt, num_tokens = question
    adapter = SUM if name == "sum" else name
    params = SamplingParams(max_tokens=num_tokens, temperature=GREEDY.temperature, ignore_eos=True)
    leaves_after = soak.draw.choice((None, None, 1, 5))
    token_ids: list[int] = []
    try:
        async with AsyncClient(f"127.0.0.1:{soak.server.grpc_port}", timeout=ANSWER_S) as client:
            async for delta in client.stream(soak.world.prompts[prompt], params=params, adapter=adapter):
                token_ids += delta.token_ids
                if delta.finish_reason == "abort":
                    soak.report.add("gRPC", "cut by the stop")
                    return
                if leaves_after is not None and len(token_ids) >= leaves_after:
                    break
    except LoraserveError as error:
        if type(error).__name__ in ("AdapterNotFoundError", "AdapterUnavailableError", "OverloadedError"):
            soak.report.add("gRPC", type(error).__name__)
        else:
            soak.lost("gRPC", since, error)
        return
    is_whole = leaves_after is not None or len(token_ids) == num_tokens
    soak.judge("gRPC", question, since, Answer(tuple(token_ids) if is_whole else (), ""))


async def leaves(soak: Soak, client: httpx.AsyncClient) -> None:
    """Goes away in the middle of a stream."""
    question = soak.question()
    async with client.stream("POST", "/v1/completions", json=soak.body(*question, stream=True)) as response:
        async for _ in response.aiter_lines():
            if soak.draw.random() < 0.2:
                break
    soak.report.add("leaves", "left")


async def never_reads(soak: Soak, _: httpx.AsyncClient) -> None:
    """Asks, and takes nothing of the answer."""
    writer = await _send(soak, soak.body(*soak.question(), stream=True, n=8))
    await asyncio.sleep(soak.draw.uniform(0.5, 3.0))
    await _leave(writer)
    soak.report.add("never reads", "left")


async def sends_half(soak: Soak, _: httpx.AsyncClient) -> None:
    """Stops in the middle of a head or of a body, and goes away later."""
    writer = await _send(soak, soak.body(*soak.question()), part=soak.draw.uniform(0.05, 0.95))
    await asyncio.sleep(soak.draw.uniform(0.2, 2.0))
    await _leave(writer)
    soak.report.add("sends half", "left")


async def hurries(soak: Soak, client: httpx.AsyncClient) -> None:
    """Has no time; nothing of it may be left."""
    question, since = soak.question(), time.monotonic()
    limit = f"{soak.draw.choice((0.001, 0.01, 0.05, 0.2))}"
    response = await client.post(
        "/v1/completions", json=soak.body(*question), headers={"x-request-timeout": limit}
    )
    if response.status_code == 408:
        soak.report.add("hurries", "408 too late")
    elif response.status_code == 200:
        soak.judge("hurries", question, since, whole_answer(response, question[2]))
    else:
        soak.refused("hurries", response, since)


async def asks_for_a_form(soak: Soak, client: httpx.AsyncClient) -> None:
    """A grammar's answer is one of its own."""
    name, prompt, _ = soak.question()
    since = time.monotonic()
    body = soak.body(name, prompt, 12, guided_choice=["yes", "no", "perhaps"]) | {"ignore_eos": False}
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        soak.refused("form", response, since)
    elif response.json()["choices"][0]["text"] in ("yes", "no", "perhaps"):
        soak.report.add("form", "one of the choices")
    else:
        soak.report.fault("form", response.text)


BAD_BODIES: dict[str, tuple[int, bytes]] = {
    "no JSON": (400, b'{"model": "tiny", "prompt": '),
    "no object": (400, b"[1, 2]"),
    "unknown field": (400, b'{"model": "tiny", "prompt": "a", "adaptor": "s1"}'),
    "wrong type": (400, b'{"model": "tiny", "prompt": {"a": 1}}'),
    "huge number": (400, b'{"model": "tiny", "prompt": "a", "max_tokens": 1e400}'),
    "token out of range": (400, b'{"model": "tiny", "prompt": [999999999]}'),
    "unknown model": (404, b'{"model": "nobody", "prompt": "a"}'),
    "deep": (400, b"[" * 100_000),
    "many objects": (413, b'{"model": "tiny", "prompt": [' + b"{}," * 300_000 + b"{}]}"),
    "many ids": (413, b'{"model": "tiny", "prompt": [' + b"1," * 2_000_000 + b"1]}"),
    "long text": (400, b'{"model": "tiny", "prompt": "' + b"1" * 3_000_000 + b'"}'),
    "template": (400, b'{"model": "tiny", "prompt": "a", "chat_template": "{{ 1 }}"}'),
    "grammar": (
        400,
        b'{"model": "tiny", "prompt": "a", "guided_regex": "((((((a{1,99}){1,99}){1,99}){1,99}"}',
    ),
}


async def sends_what_is_wrong(soak: Soak, client: httpx.AsyncClient) -> None:
    """Every body is refused with the status that says why."""
    what, (status, body) = soak.draw.choice(list(BAD_BODIES.items()))
    since = time.monotonic()
    response = await client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    kind = f"wrong: {what}"
    if response.status_code == status and "error" in response.json():
        soak.report.add(kind, f"{status} refused")
    else:
        soak.refused(kind, response, since)


async def sends_what_is_no_message(soak: Soak, _: httpx.AsyncClient) -> None:
    """The same over gRPC."""
    since = time.monotonic()
    data = soak.draw.choice((b"\xff", soak.draw.randbytes(200), b"\x1a\xc0\x9a\x0c" + b"\x0a\x00" * 100_000))
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{soak.server.grpc_port}") as channel:
            async for _ in channel.unary_stream("/loraserve.v1.LoraServe/Generate")(data, timeout=ANSWER_S):
                pass
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
            soak.report.add("wrong: no message", error.code().name)
        else:
            soak.lost("wrong: no message", since, error)


CALLERS: dict[Caller, int] = {  # how many of each are there at once
    reads_all: 3,
    streams: 4,
    samples: 2,
    over_grpc: 3,
    leaves: 2,
    never_reads: 2,
    sends_half: 2,
    hurries: 1,
    asks_for_a_form: 1,
    sends_what_is_wrong: 1,
    sends_what_is_no_message: 1,
}


async def keep_calling(soak: Soak, caller: Caller, stop: asyncio.Event) -> None:
    """Calls again and again; what the caller did not expect is the server's absence, or a fault."""
    async with httpx.AsyncClient(timeout=ANSWER_S) as client:
        while not stop.is_set():
            since = time.monotonic()
            client.base_url = soak.server.url
            try:
                await asyncio.wait_for(caller(soak, client), 2 * ANSWER_S)
            except (httpx.HTTPError, OSError, asyncio.TimeoutError, ValueError, KeyError) as error:
                soak.lost(caller.__name__.replace("_", " "), since, error)
                await asyncio.sleep(0.1)


async def _send(soak: Soak, body: dict[str, Any], part: float = 1.0) -> asyncio.StreamWriter:
    """A request on a connection of its own, or the beginning of one."""
    data = json.dumps(body).encode()
    headers = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    whole = f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + data
    _, writer = await asyncio.open_connection("127.0.0.1", soak.server.port)
    writer.write(whole[: max(1, int(part * len(whole)))])
    with suppress(ConnectionError):
        await writer.drain()
    return writer


async def _leave(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(ConnectionError):
        await writer.wait_closed()
