"""Grammars as their callers write them, and the matchers made of them."""

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from loraserve import Grammar
from loraserve.errors import InvalidRequestError
from loraserve.loader import open_checkpoint
from loraserve.sampling import grammar_compiler
from loraserve.sampling.grammar_compiler import (
    CACHE_SIZE,
    FREE_S,
    MAX_MEAN_STEP_S,
    GrammarCompiler,
    GrammarMatcher,
)
from loraserve.text.tokenizer import Tokenizer
from tokenizers import AddedToken

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 'quote"d']}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "yes, sir", "no\nway", 'a "quoted" one', "naïve 日本 \\d"]


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        list(value) == ["name", "age", "tags"]
        and len(value["name"]) <= 8
        and 0 <= value["age"] <= 150
        and set(value["tags"]) <= {"a", "é", 'quote"d'}
    )


FORMS: list[tuple[Grammar, Callable[[str], Any]]] = [
    (Grammar("json_schema", SCHEMA), is_of_schema),
    (Grammar("json_schema", json.dumps(SCHEMA)), is_of_schema),
    (Grammar("regex", r"[a-f]{2,5}-\d{3}(é|ü)?"), re.compile(r"[a-f]{2,5}-\d{3}(é|ü)?").fullmatch),
    (Grammar("lark", 'start: "<" /[a-z]{1,3}/ ">"'), re.compile("<[a-z]{1,3}>").fullmatch),
    (Grammar("choice", CHOICES), CHOICES.__contains__),
]

REFUSED: list[tuple[str, Any, str]] = [
    ("yaml", "", "grammar kind is 'yaml', it must be one of"),
    ("json", {"type": "object"}, "takes no value"),
    ("json_schema", "{", "not JSON"),
    ("json_schema", "[" * 100_000, "not JSON"),
    ("json_schema", 5, "an object or true"),
    ("json_schema", False, "is False, it must be an object or true"),
    ("json_schema", {"a": {1, 2}}, "not JSON"),
    ("regex", "", "not empty"),
    ("regex", None, "not empty"),
    ("regex", "a" * 70_000, "70000 characters, the limit is 65536"),
    ("choice", [], "1 to 1024 strings"),
    ("choice", "abc", "1 to 1024 strings"),
    ("choice", ["a", 1], "1 to 1024 strings"),
    ("choice", ["a", ""], "not empty"),
    ("choice", [str(i) for i in range(2000)], "1 to 1024 strings"),
]

NOT_COMPILED: list[tuple[str, Any, str]] = [
    ("regex", "(a", "unclosed group"),
    ("regex", "", "empty text"),
    ("lark", "start: nope", "unknown name"),
    ("json_schema", {"type": "foo"}, "foo"),
    ("json_schema", {"$ref": "http://example.com/s"}, "example.com"),
    ("json_schema", {"$ref": "file:///etc/passwd"}, "can't be used"),
    ("json_schema", {"not": {"type": "object"}}, "not"),
]


def nested_schema(depth: int, width: int) -> dict[str, Any]:
    leaf = {"type": "string", "pattern": "^[a-z]{1,9}$"}
    inner = leaf if depth == 0 else nested_schema(depth - 1, width)
    return {"type": "object", "properties": {f"p{index}": inner for index in range(width)}}


HOSTILE = [
    Grammar("regex", "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"),
    Grammar("regex", "(.*a.{20})(.*b.{20}c)(.*d.{15})"),
    Grammar("regex", "(.*(a|b).*c.{1,40}){30}"),
    Grammar("regex", "(" * 3000 + "a" + ")" * 3000),
    Grammar("lark", 'start: e\ne: e e | "a" | '),
    Grammar("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    Grammar("json_schema", nested_schema(2, 10)),
    Grammar("json_schema", '{"items":' * 900 + "{}" + "}" * 900),
    *(
        Grammar("lark", "start: X\nX: " + " & ".join(f"/.*a.{{{index}}}b.*/" for index in range(count)))
        for count in (6, 7, 8, 30)
    ),
]
PATTERNS = [{"type": "string", "pattern": f".*a.{{{index}}}b.*"} for index in range(30)]
CHAIN = {f"d{index}": {**one, "$ref": f"#/$defs/d{index + 1}"} for index, one in enumerate(PATTERNS)}
ON_ONE_VALUE = [
    {"properties": {"x": {"allOf": PATTERNS}}},
    {"properties": {"x": {"anyOf": [{"allOf": [{"anyOf": [one]} for one in PATTERNS]}]}}},
    {"$defs": {**CHAIN, "d30": {}}, "properties": {"x": {"$ref": "#/$defs/d0"}}},
    {"allOf": [{"properties": {"x": one}} for one in PATTERNS]},
]


def allowed_by(
    matcher: GrammarMatcher, vocab_size: int, *, without_end: bool = False
) -> npt.NDArray[np.bool_] | None:
    """The mask's bits, one by one."""
    words = matcher.allowed(vocab_size, without_end=without_end)
    if words is None:
        return None
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(np.bool_)
    assert not bits[vocab_size:].any()
    return bits[:vocab_size]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Tokenizer:
    with open_checkpoint(smollm2_path) as checkpoint:
        return checkpoint.load_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


@pytest.mark.parametrize(("kind", "value", "message"), REFUSED)
def test_a_grammar_that_is_none_is_refused(kind: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        Grammar(kind, value)


def test_equal_schemas_are_equal_grammars() -> None:
    assert Grammar("json_schema", SCHEMA) == Grammar("json_schema", json.dumps(SCHEMA, indent=2))
    assert len({Grammar("choice", ["a"]), Grammar("choice", ("a",)), Grammar("json")}) == 2


@pytest.mark.parametrize(("kind", "value", "message"), NOT_COMPILED)
def test_what_can_not_be_compiled_is_refused(
    compiler: GrammarCompiler, kind: str, value: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        compiler.compile(Grammar(kind, value if value != "" else "(a{0})"))


@pytest.mark.parametrize(("grammar", "is_valid"), FORMS)
def test_any_walk_over_allowed_tokens_ends_in_valid_text(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, is_valid: Callable[[str], Any]
) -> None:
    for seed in range(20):
        matcher, rng, token_ids = compiler.compile(grammar), random.Random(seed), list[int]()
        while not matcher.is_ended:
            allowed = allowed_by(matcher, tokenizer.vocab_size)
            assert allowed is not None
            token_ids.append(int(rng.choice(np.flatnonzero(allowed))))
            matcher.consume(token_ids[-1])
            assert len(token_ids) < 400
        assert is_valid(tokenizer.decode(token_ids)), tokenizer.decode(token_ids)


def test_end_tokens_are_left_out_while_there_are_others(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(Grammar("choice", ["no", "no way"]))
    matcher.consume(tokenizer.encode("no")[0])
    end = tokenizer.eos_token_ids[0]
    plain = allowed_by(matcher, tokenizer.vocab_size)
    without_end = allowed_by(matcher, tokenizer.vocab_size, without_end=True)
    assert plain is not None
    assert without_end is not None
    assert (plain[end], without_end[end]) == (True, False)
    assert without_end.any()


def test_the_mask_is_as_long_as_the_logits(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(Grammar("json"))
    short, exact, long = (allowed_by(matcher, tokenizer.vocab_size + extra) for extra in (-9, 0, 75))
    assert short is not None
    assert exact is not None
    assert long is not None
    assert short.tolist() == exact[:-9].tolist()
    assert long[:-75].tolist() == exact.tolist()
    assert not long[-75:].any()


@pytest.mark.parametrize("grammar", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_grammar_costs_a_bounded_time_or_is_refused(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar
) -> None:
    rng, times = random.Random(0), []
    started = time.thread_time()
    try:
        matcher = compiler.compile(grammar)
    except InvalidRequestError:
        assert time.thread_time() - started < 2.0
        return
    assert time.thread_time() - started < 2.0
    for _ in range(300):
        started = time.thread_time()
        allowed = allowed_by(matcher, tokenizer.vocab_size)
        if allowed is None or matcher.is_ended:
            break
        matcher.consume(int(rng.choice(np.flatnonzero(allowed))))
        times.append(time.thread_time() - started)
    assert (matcher.error is None) == (allowed is not None)
    assert sum(times) < FREE_S + (len(times) + 50) * MAX_MEAN_STEP_S


@pytest.mark.parametrize("schema", ON_ONE_VALUE, ids=range(len(ON_ONE_VALUE)))
def test_many_patterns_on_one_value_are_refused(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    for grammar in (Grammar("json_schema", schema), Grammar("lark", f"start: %json {json.dumps(schema)}")):
        with pytest.raises(InvalidRequestError, match="s of computing|memory"):
            compiler.compile(grammar)


def test_many_patterns_on_values_of_their_own_are_taken(compiler: GrammarCompiler) -> None:
    words = [{"type": "string", "pattern": f"a{index}"} for index in range(30)]
    schema = {"$defs": {"a": words[0]}, "properties": {f"x{index}": one for index, one in enumerate(words)}}
    schema["properties"] |= {"y": {"anyOf": words}, "z": {"$ref": "#/$defs/a"}, "self": {"$ref": "#"}}
    compiler.compile(Grammar("json_schema", schema))


def test_a_grammar_that_is_slow_at_every_token_is_given_up(
    compiler: GrammarCompiler, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = compiler.compile(Grammar("regex", "[a-z]{50}q"))
    monkeypatch.setattr(grammar_compiler, "FREE_S", 0.0)
    monkeypatch.setattr(grammar_compiler, "MAX_MEAN_STEP_S", 1e-9)
    assert allowed_by(matcher, tokenizer.vocab_size) is None
    assert not matcher.is_ended
    assert "ms a token" in str(matcher.error)


def test_compiled_grammars_are_kept_and_copies_are_independent(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    grammars = [Grammar("regex", f"a{{{n + 1}}}b") for n in range(CACHE_SIZE + 5)]
    matchers = [compiler.compile(grammar) for grammar in grammars]
    assert len(compiler._compiled) == CACHE_SIZE
    again = compiler.compile(grammars[-1])
    allowed = allowed_by(again, tokenizer.vocab_size)
    assert allowed is not None
    token_id = int(np.flatnonzero(allowed)[0])
    again.consume(token_id)
    fresh = allowed_by(matchers[-1], tokenizer.vocab_size)
    assert fresh is not None
    assert fresh.tolist() == allowed.tolist()


def test_a_grammar_may_ask_for_tokens_beyond_the_models(tokenizer: Tokenizer) -> None:
    base = tokenizer.vocab_size
    own = tokenizer.extended([AddedToken("<tool>", special=True)], b"own")
    compiler = GrammarCompiler(tokenizer, base)
    matcher = compiler.compile(Grammar("lark", 'start: <tool> "a"'), tokenizer=own)
    allowed = allowed_by(matcher, base + 1)
    assert allowed is not None
    assert np.flatnonzero(allowed).tolist() == [base]
    assert allowed_by(matcher, base + 40) is not None  # another adapter's row is wider still
    matcher.consume(base)
    after = allowed_by(matcher, base + 1)
    assert after is not None
    assert after.any()
    assert not after[base]
    with pytest.raises(InvalidRequestError, match="can't be used"):
        compiler.compile(Grammar("lark", 'start: <tool> "a"'))


def test_a_text_that_spells_added_tokens_is_written_in_text_and_not_ended_by_one(smollm2_path: str) -> None:
    with open_checkpoint(smollm2_path) as checkpoint:
        base = checkpoint.load_tokenizer()
    tokenizer = base.extended([AddedToken("<tool>", special=False, normalized=False)], b"added")
    num_tokens = tokenizer.vocab_size
    compiler = GrammarCompiler(tokenizer, num_tokens)
    for text in ("a<|im_end|>b", "<|im_start|>", "<tool>(x)</tool>", '{"end":"<|im_end|>"}'):
        matcher = compiler.compile(Grammar("choice", [text]))
        written: list[int] = []
        while not matcher.is_ended:
            allowed = matcher.allowed(num_tokens)
            assert allowed is not None, (text, written, matcher.error)
            token_id = int(np.nonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little"))[0][-1])
            if token_id in tokenizer.eos_token_ids:
                break
            written.append(token_id)
            matcher.consume(token_id)
        assert tokenizer.decode(written) == text
        assert not {*written} & tokenizer.added_tokens().keys()
