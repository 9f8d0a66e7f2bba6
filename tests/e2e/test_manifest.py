"""Adapters that say how they are to be used, served."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loraserve import LLM, Grammar, SamplingParams
from loraserve.adapters.manifest import AdapterManifest
from loraserve.errors import AdapterFormatError

CHAT = [{"role": "user", "content": "Hi"}]
FIELDS = {
    "description": "says yes or no",
    "system_prompt": "Be brief.",
    "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "sampling": {"max_tokens": 3, "temperature": 0.0},
    "stop": ["zzz"],
}
BAD_FIELDS = [
    ({"chat_template": "{% for %}"}, "chat template is malformed"),
    ({"system_prompt": "x", "chat_template": "{{ raise_exception('no system') }}"}, "no system"),
    ({"json_schema": {"type": "foo"}}, "json_schema grammar can't be used"),
    ({"sampling": {"stop_token_ids": [10**6]}}, "token id 1000000 is out of range"),
    ({"sampling": {"logit_bias": {"1000000": 1}}}, "token id 1000000 is out of range"),
]


@pytest.fixture
def adapter(tiny_adapters: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapters["a1"], tmp_path / "adapter"))


@pytest.fixture(scope="module")
def llm(tiny_model: tuple[Path, torch.nn.Module], tiny_adapters: dict[str, str]) -> Iterator[LLM]:
    adapters = {"plain": tiny_adapters["a1"]}
    with LLM(str(tiny_model[0]), adapters=adapters, dtype="float32", memory="64MiB") as llm:
        yield llm


def test_a_chat_is_rendered_and_sampled_as_the_manifest_says(llm: LLM, adapter: Path) -> None:
    (adapter / "loraserve.json").write_text(json.dumps(FIELDS))
    llm.load_adapter("said", adapter)
    output = llm.chat(CHAT, adapter="said")[0]
    expected = llm.generate(
        "<system>Be brief.<user>Hi", SamplingParams(max_tokens=3, temperature=0.0), "plain"
    )[0]
    assert (output.prompt_token_ids, output.token_ids) == (expected.prompt_token_ids, expected.token_ids)
    assert len(llm.chat(CHAT, SamplingParams(max_tokens=5, ignore_eos=True), "said")[0].token_ids) == 5
    assert len(llm.chat(CHAT, SamplingParams(ignore_eos=True), {"said": 0.5})[0].token_ids) == 3
    assert (
        len(llm.chat(CHAT, SamplingParams(ignore_eos=True), {"said": 0.5, "plain": 0.5})[0].token_ids) == 16
    )
    listed = {info.name: info for info in llm.adapters()}
    assert listed["said"].description == "says yes or no"
    assert listed["plain"].description is None
    llm.unload_adapter("said")


def test_a_schema_in_the_manifest_is_kept_unless_the_request_says_otherwise(llm: LLM, adapter: Path) -> None:
    manifest = AdapterManifest.from_fields({"json_schema": {"enum": ["yes", "no"]}}, "here")
    llm.load_adapter("strict", adapter, manifest)
    answers = llm.generate(["Is it?"] * 4, SamplingParams(max_tokens=20), "strict")
    assert {answer.text for answer in answers} <= {'"yes"', '"no"'}
    other = SamplingParams(max_tokens=20, grammar=Grammar("choice", ["maybe"]))
    assert llm.generate("Is it?", other, "strict")[0].text == "maybe"
    free = SamplingParams(max_tokens=20, grammar=None, ignore_eos=True)
    assert len(llm.generate("Is it?", free, "strict")[0].token_ids) == 20
    llm.unload_adapter("strict")


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_a_manifest_that_would_fail_requests_is_refused_at_load(
    llm: LLM, adapter: Path, fields: dict[str, object], message: str
) -> None:
    (adapter / "loraserve.json").write_text(json.dumps(fields))
    with pytest.raises(AdapterFormatError, match=f"manifest of adapter 'bad': .*{message}"):
        llm.load_adapter("bad", adapter)
    assert [info.name for info in llm.adapters()] == ["plain"]


def test_the_engines_settings_go_over_the_directorys_manifest(
    tiny_model: tuple[Path, torch.nn.Module], adapter: Path
) -> None:
    (adapter / "loraserve.json").write_text(json.dumps(FIELDS))
    manifests = {"said": AdapterManifest.from_fields({"sampling": {"max_tokens": 2}}, "settings")}
    with LLM(
        str(tiny_model[0]), {"said": str(adapter)}, dtype="float32", memory="64MiB", manifests=manifests
    ) as llm:
        assert len(llm.generate("Hi", SamplingParams(ignore_eos=True), "said")[0].token_ids) == 2
