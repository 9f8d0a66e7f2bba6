"""A client of its own process for the HTTP benches: streams answers, and notes when each event came.

It is started with a plan as JSON on stdin and answers with JSON on stdout; times are `time.perf_counter()`,
which on Linux is one clock for all processes.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

DATA = b"data: "
DONE = b"[DONE]"


@dataclass
class Answer:
    """What came back: event times, and the text if the stream was whole."""

    status: int = 0
    text: str = ""
    is_whole: bool = False
    error: str = ""
    retry_after_s: float = 0.0
    times: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """Notes what came and when, and reads it at the end: a client that takes the server little time."""

    def __init__(self, max_events: int | None) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self.pieces: list[tuple[float, bytes]] = []
        self._max_events = max_events
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))
        if self._max_events is not None and len(self.pieces) > self._max_events:
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(repr(error) if error is not None else "")


async def stream(host: str, port: int, body: dict[str, Any], *, max_events: int | None = None) -> Answer:
    """One streamed completion on a connection of its own; left after some `max_events`, if that is given."""
    loop = asyncio.get_running_loop()
    try:
        transport, connection = await loop.create_connection(lambda: Connection(max_events), host, port)
    except OSError as error:
        return Answer(error=repr(error))
    payload = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    transport.write(f"{head}connection: close\r\ncontent-length: {len(payload)}\r\n\r\n".encode() + payload)
    error = await connection.ended
    return _answer(connection.pieces, error)


def _answer(pieces: list[tuple[float, bytes]], error: str) -> Answer:
    """The events in `pieces`; a line belongs to the moment at which its end came."""
    answer, rest, is_body, parts = Answer(error=error), b"", False, []
    for moment, data in pieces:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            text = line.rstrip()
            if not answer.status:
                answer.status = int(text.split()[1])
            elif not is_body:
                is_body = not text
                name, _, value = text.partition(b": ")
                if name == b"retry-after":
                    answer.retry_after_s = float(value)
            elif text.startswith(DATA):
                _read_event(text[len(DATA) :], moment, answer, parts)
    if answer.status != 200:
        answer.error = answer.error or rest.decode(errors="replace")[:300]
    answer.text = "".join(parts)
    return answer


def _read_event(event: bytes, moment: float, answer: Answer, parts: list[str]) -> None:
    if event == DONE:
        answer.is_whole = True
        return
    fields = json.loads(event)
    if "error" in fields:
        answer.error = str(fields["error"])
    elif fields["choices"][0]["text"]:
        answer.times.append(moment)
        parts.append(fields["choices"][0]["text"])


async def all_at_once(plan: dict[str, Any]) -> dict[str, Any]:
    """Every body of the plan as a stream, together."""
    answers = await asyncio.gather(*(stream(plan["host"], plan["port"], body) for body in plan["bodies"]))
    return {"answers": [asdict(answer) for answer in answers]}


class Load:
    """Clients that ask one question after another and check every answer."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.ttfts_s: list[float] = []
        self.totals_s: list[float] = []

    async def run(self) -> dict[str, Any]:
        end = time.perf_counter() + self._plan["seconds"]
        await asyncio.gather(*(self._client(seed, end) for seed in range(self._plan["clients"])))
        return {
            "outcomes": dict(self.outcomes),
            "problems": self.problems[:20],
            "ttfts_s": self.ttfts_s,
            "totals_s": self.totals_s,
        }

    async def _client(self, seed: int, end: float) -> None:
        dice = random.Random(seed)
        await asyncio.sleep(dice.random())
        while time.perf_counter() < end:
            question = dice.choice(self._plan["questions"])
            leaves = dice.random() < self._plan["leave_share"]
            self.outcomes["sent"] += 1
            started = time.perf_counter()
            answer = await stream(
                self._plan["host"], self._plan["port"], question["body"], max_events=3 if leaves else None
            )
            self._judge(question, answer, started, leaves=leaves)
            if answer.status == 429:
                await asyncio.sleep(answer.retry_after_s * (0.5 + dice.random()))

    def _judge(self, question: dict[str, Any], answer: Answer, started: float, *, leaves: bool) -> None:
        if answer.status == 429 and answer.retry_after_s > 0:
            self.outcomes["429"] += 1
        elif answer.status != 200 or answer.error or not (answer.is_whole or leaves):
            self.outcomes["lost"] += 1
            self.problems.append(f"{answer.status} {answer.error or 'the stream broke off'}")
        elif not question["text"].startswith(answer.text) or (
            answer.is_whole and answer.text != question["text"]
        ):
            self.outcomes["wrong"] += 1
            self.problems.append(f"{question['body']['model']}: {answer.text!r} is not {question['text']!r}")
        else:
            self.outcomes["left" if leaves else "full"] += 1
            self.ttfts_s.append(answer.times[0] - started)
            self.totals_s.append(answer.times[-1] - started)


def main() -> None:
    plan = json.load(sys.stdin)
    result = asyncio.run(Load(plan).run() if plan["kind"] == "load" else all_at_once(plan))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
