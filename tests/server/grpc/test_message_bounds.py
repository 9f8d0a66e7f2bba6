"""Messages of very many values are refused before they are parsed, those that people send are not."""

import grpc
import pytest
from loraserve.errors import InvalidRequestError
from loraserve.server.grpc.message_bounds import MAX_NUMBERS, MAX_OBJECTS, UNCOUNTED_NBYTES, counter
from loraserve.v1 import loraserve_pb2 as pb

from tests.server.fake_engine import FakeEngine
from tests.server.server_thread import ServerThread

METHOD = "/loraserve.v1.LoraServe/Generate"
EMPTY_TURN = b"\x0a\x00"  # ChatMessages.messages


def within_chat(turns: bytes) -> bytes:
    """A GenerateRequest whose chat has these bytes."""
    length, prefix = len(turns), b"\x1a"
    while length > 127:
        prefix += bytes([length & 127 | 128])
        length >>= 7
    return prefix + bytes([length]) + turns


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (within_chat(EMPTY_TURN * (MAX_OBJECTS + 1)), "messages and texts"),
        (within_chat(EMPTY_TURN * 4_000_000), "messages and texts"),
        (pb.GenerateRequest(sampling=pb.SamplingParams(stop=[""] * 2 * MAX_OBJECTS)), "messages and texts"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * (MAX_NUMBERS + 1))), "numbers"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1000] * (MAX_NUMBERS + 1))), "numbers"),
        (b"\x3a\x00" * 4_000_000, "messages and texts"),  # fields that this method does not know
        (b"\x40\x01" * 4_000_000, "numbers"),  # the same field again and again
    ],
    ids=["turns", "more_turns", "stop_strings", "ids", "large_ids", "unknown_fields", "repeated"],
)
def test_too_many_values_are_refused_by_their_number(data: bytes | pb.GenerateRequest, what: str) -> None:
    nbytes = data if isinstance(data, bytes) else data.SerializeToString()
    with pytest.raises(InvalidRequestError, match=f"more than [0-9]+ {what}, which is the limit"):
        counter(pb.GenerateRequest.DESCRIPTOR)(nbytes)


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(text="a" * 1_000_000),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[100_000] * (MAX_NUMBERS - 1000))),
        pb.GenerateRequest(
            chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello, you")] * 8192)
        ),
        pb.GenerateRequest(
            text="a" * UNCOUNTED_NBYTES,
            adapters={f"adapter {i}": 1.0 for i in range(16)},
            sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(30_000), 1.0)),
        ),
    ],
    ids=["text", "ids", "turns", "maps"],
)
def test_large_requests_are_not(message: pb.GenerateRequest) -> None:
    counter(pb.GenerateRequest.DESCRIPTOR)(message.SerializeToString())


def test_a_refused_message_ends_its_call_alone() -> None:
    with ServerThread(FakeEngine) as server, grpc.insecure_channel(server.address) as channel:
        generate = channel.unary_stream(METHOD, response_deserializer=pb.GenerateResponse.FromString)
        with pytest.raises(grpc.RpcError) as caught:
            list(generate(within_chat(EMPTY_TURN * 1_000_000)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "messages and texts" in caught.value.details()
        assert list(generate(pb.GenerateRequest(text="one two").SerializeToString()))
