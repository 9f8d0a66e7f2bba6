"""`loraserve.json`: read, checked, merged; and what it changes in a request."""

import json
from pathlib import Path
from typing import Any

import pytest
from loraserve import Grammar, SamplingParams
from loraserve.adapters.manifest import AdapterManifest, read_manifest
from loraserve.errors import AdapterFormatError

WHOLE = {
    "description": "writes SQL",
    "system_prompt": "Answer in SQL.",
    "chat_template": "{{ messages[0].content }}",
    "stop": [";"],
    "sampling": {"temperature": 0.0, "max_tokens": 9, "logit_bias": {"5": -1}, "stop_token_ids": [3]},
    "json_schema": {"type": "object"},
    "speculate": False,
}

REFUSED: list[tuple[Any, str]] = [
    ([], "is not a JSON object"),
    ({"colour": 1}, "has the field 'colour', known are"),
    ({"stopp": []}, "did you mean stop?"),
    ({"temperature": 0}, "did you mean sampling.temperature?"),
    ({"description": 5}, "description is 5"),
    ({"system_prompt": ["a"]}, "system_prompt is"),
    ({"stop": [""]}, "non-empty string"),
    ({"stop": 5}, "stop is 5"),
    ({"sampling": []}, "must be an object"),
    ({"sampling": {"n": 2}}, "sampling has 'n', an adapter may set"),
    ({"sampling": {"temperature": -1}}, "temperature is -1"),
    ({"sampling": {"logit_bias": {"x": 1}}}, "not a token id"),
    ({"json_schema": "{"}, "not JSON"),
    ({"speculate": 0}, "speculate is 0"),
    ({"chat_template": "x" * 300_000}, "300000 characters"),
]


def test_every_field_is_read() -> None:
    manifest = AdapterManifest.from_fields(WHOLE, "here")
    assert manifest.description == "writes SQL"
    assert manifest.request_defaults == {
        "temperature": 0.0,
        "max_tokens": 9,
        "logit_bias": {5: -1.0},
        "stop_token_ids": (3,),
        "stop": (";",),
        "grammar": Grammar("json_schema", {"type": "object"}),
        "speculate": False,
    }


def test_a_manifest_written_as_json_is_read_as_it_was() -> None:
    for values in (WHOLE, {}, {"json_schema": {}}, {"stop": []}):
        manifest = AdapterManifest.from_fields(values, "here")
        assert AdapterManifest.from_fields(json.loads(json.dumps(manifest.to_fields())), "there") == manifest


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_wrong_manifest_is_refused_with_its_place(values: Any, message: str) -> None:
    with pytest.raises(AdapterFormatError, match=f"^here.*{message}"):
        AdapterManifest.from_fields(values, "here")


def test_the_file_is_optional_but_must_be_right(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path)) is None
    file = tmp_path / "loraserve.json"
    file.write_text(json.dumps(WHOLE))
    assert read_manifest(str(tmp_path)) == AdapterManifest.from_fields(WHOLE, "here")
    for text in (b"{", b"\xff\xfe", b"[" * 100_000, b" " * 2**21):
        file.write_bytes(text)
        with pytest.raises(AdapterFormatError, match=r"loraserve\.json"):
            read_manifest(str(tmp_path))


def test_one_manifest_goes_over_another_field_by_field() -> None:
    file = AdapterManifest.from_fields(WHOLE, "file")
    config = AdapterManifest.from_fields({"description": "mine", "sampling": {"max_tokens": 5}}, "config")
    merged = config.merged_over(file)
    assert (merged.description, merged.system_prompt) == ("mine", "Answer in SQL.")
    assert merged.sampling == {**file.sampling, "max_tokens": 5}
    assert merged.speculate is False


def test_guesses_are_left_out_by_a_manifest_and_asked_for_by_none() -> None:
    file, config = (AdapterManifest.from_fields({"speculate": value}, "here") for value in (False, True))
    assert file.request_defaults == {"speculate": False}
    assert config.merged_over(file).request_defaults == {}
    assert SamplingParams(speculate=True).with_defaults(file.request_defaults).speculate is True
    assert config.merged_over(None) == config


def test_what_a_request_gives_wins_even_if_it_is_the_default() -> None:
    defaults = AdapterManifest.from_fields(WHOLE, "file").request_defaults
    params = SamplingParams(temperature=1.0, grammar=None, stop=()).with_defaults(defaults)
    assert (params.temperature, params.grammar, params.stop) == (1.0, None, ())
    assert (params.max_tokens, params.logit_bias) == (9, {5: -1.0})
    assert params.given == {"temperature", "grammar", "stop"}


def test_the_system_prompt_goes_before_a_chat_without_one() -> None:
    manifest = AdapterManifest.from_fields(WHOLE, "file")
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "mine"}
    assert manifest.with_system_prompt([user]) == [{"role": "system", "content": "Answer in SQL."}, user]
    assert manifest.with_system_prompt([system, user]) == [system, user]
