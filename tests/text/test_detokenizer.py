"""Incremental detokenisation and stop strings: any way of cutting the stream gives the same text."""

import random

import pytest
import tokenizers
from loraserve.loader import open_checkpoint
from loraserve.text.detokenizer import MAX_WHOLE, IncrementalDetokenizer, StopStrings
from loraserve.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Tokenizer:
    with open_checkpoint(smollm2_path) as checkpoint:
        return checkpoint.load_tokenizer()


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a piece of a character: alone they are not UTF-8."""
    ids = range(tokenizer.vocab_size)
    return [index for index in ids if "\ufffd" in tokenizer.decode([index])]


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A tokenizer like Llama 2's: spaces as U+2581, the first one dropped, unknown bytes as <0xNN>."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁", "b", "▁the", "é"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, special_tokens={"bos_token": "<s>"})


def random_chunks(items: list[int], rng: random.Random) -> list[list[int]]:
    chunks, at = [], 0
    while at < len(items):
        size = rng.choice([1, 1, 1, 2, 3, 40])
        chunks.append(items[at : at + size])
        at += size
    return chunks


def stream(tokenizer: Tokenizer, chunks: list[list[int]]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


@pytest.mark.parametrize("seed", range(20))
def test_joined_deltas_equal_decoding_everything(
    seed: int, tokenizer: Tokenizer, byte_ids: list[int]
) -> None:
    rng = random.Random(seed)
    pools = [
        range(tokenizer.vocab_size),
        byte_ids,
        [*tokenizer.special_ids],
        [*byte_ids, *tokenizer.special_ids],
    ]
    for _ in range(30):
        ids = [rng.choice(pool) for pool in rng.choices(pools, k=rng.randrange(1, 12)) for _ in range(9)]
        assert "".join(stream(tokenizer, random_chunks(ids, rng))) == tokenizer.decode(ids)


TEXT = "naïve 🙂👩‍👩‍👧 日本語 the end é " * 4


def test_no_delta_holds_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    deltas = stream(tokenizer, [[token] for token in ids])
    assert "".join(deltas) == TEXT
    assert all("\ufffd" not in delta for delta in deltas)
    assert sum(delta == "" for delta in deltas) > 10


def test_byte_fallback_vocabularies_stream_whole_characters(sentencepiece: Tokenizer) -> None:
    emoji = [2 + byte for byte in "🙂".encode()]
    the, space, b = 261, 259, 260
    ids = [0, the, space, *emoji, b, the, *emoji, *emoji, the, b, 262, 1] * 5
    deltas = stream(sentencepiece, [[token] for token in ids])
    assert "".join(deltas) == sentencepiece.decode(ids)
    assert all("\ufffd" not in delta for delta in deltas)


def test_characters_in_several_tokens_come_out_whole_behind_long_runs_of_others(tokenizer: Tokenizer) -> None:
    words, emoji = tokenizer.encode(" one two three"), tokenizer.encode("👩‍🚀")
    for num_runs in range(2 * MAX_WHOLE // len(words)):
        ids = words * num_runs + emoji + words
        deltas = stream(tokenizer, [[token] for token in ids])
        assert "".join(deltas) == tokenizer.decode(ids)
        assert all("\ufffd" not in delta for delta in deltas)


def test_an_unfinished_character_comes_out_when_flushed(tokenizer: Tokenizer, byte_ids: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([*tokenizer.encode("x"), byte_ids[0]]) == "x"
    assert detokenizer.flush() == "\ufffd"


def test_the_cost_per_token_does_not_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, num_decoded = Tokenizer.decode, 0

    def count(self: Tokenizer, token_ids: list[int], **options: bool) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return decode(self, token_ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", count)
    ids = (tokenizer.encode(TEXT) * 4000)[:4000]
    stream(tokenizer, [[token] for token in ids])
    assert num_decoded < 40 * len(ids)


def push_all(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    stopper = StopStrings(stops)
    text = "".join(stopper.push(chunk) for chunk in chunks)
    return text + stopper.flush(), stopper.is_matched


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "abc", ("abc", False)),
        (["x"], "abc", ("abc", False)),
        (["b"], "abc", ("a", True)),
        (["a"], "abc", ("", True)),
        (["cd"], "abc", ("abc", False)),
        (["aab"], "aaab", ("a", True)),
        (["abcd", "bc"], "xabcd", ("xa", True)),
        (["bc", "abc"], "xabc", ("x", True)),
        (["\n\n"], "a\nb\n\nc", ("a\nb", True)),
        (["", "é"], "caf" + "é!", ("caf", True)),
    ],
)
def test_text_is_cut_before_the_first_completed_stop_however_it_arrives(
    stops: list[str], text: str, expected: tuple[str, bool]
) -> None:
    assert push_all(stops, [text]) == expected
    assert push_all(stops, list(text)) == expected


def test_random_cuts_of_a_stream_stop_at_the_same_place() -> None:
    rng = random.Random(3)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(1, 15)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert push_all(stops, chunks) == push_all(stops, list(text)), (stops, chunks)


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    stopper = StopStrings(["<end>"])
    assert [stopper.push(piece) for piece in ["a<", "e", "x<en", "d"]] == ["a", "", "<ex", ""]
    assert stopper.flush() == "<end"
    assert not stopper.is_matched


def test_nothing_comes_after_a_stop() -> None:
    stopper = StopStrings(["."])
    assert [stopper.push("a.b"), stopper.push("c"), stopper.flush()] == ["a", "", ""]
