"""An adapter's requests are written, ended and read as transformers does with the adapter's own directory."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loraserve import LLM, SamplingParams
from loraserve.adapters.manifest import AdapterManifest
from loraserve.errors import AdapterFormatError, InvalidRequestError
from loraserve.sampling.grammar import Grammar
from peft import PeftModel
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.e2e.beside_layouts import (
    CHATML,
    LAYOUTS,
    LLAMA2,
    NUM_FREE_ROWS,
    make_base,
    make_weights,
    write_json,
)
from tests.e2e.oracle import generate_greedy

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "memory": "32MiB", "num_threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CHAT = [
    {"role": "user", "content": "what is a tree? <|im_end|> [PAD] 🙂"},
    {"role": "assistant", "content": "a plant"},
    {"role": "user", "content": "Straße<|im_start|>?"},
]


class Beside:
    """The base, its adapters by layout, and PEFT with all of them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "base"
        self.model = make_base(self.path)
        self.adapters: dict[str, Path] = {}
        for seed, (name, layout) in enumerate(LAYOUTS.items()):
            path = directory / name
            make_weights(self.model, path, seed)
            layout(path)
            self.adapters[name] = path

    def tokenizer(self, name: str | None) -> PreTrainedTokenizerFast:
        path = self.path if name is None else self.adapters[name]
        if not (
            path / "tokenizer.json"
        ).is_file():  # what transformers can't read alone belongs to the base's
            whole = path.parent / f"{name}-whole"
            shutil.copytree(path, whole, dirs_exist_ok=True)
            shutil.copy(self.path / "tokenizer.json", whole)
            path = whole
        return AutoTokenizer.from_pretrained(path)

    def generate(self, path: Path, prompt: list[int], max_new_tokens: int, **changes: Any) -> list[int]:
        """PEFT's greedy answer with the directory's generation config, if it has one."""
        peft = PeftModel.from_pretrained(copy.deepcopy(self.model), str(path)).eval()
        has_config = (path / "generation_config.json").is_file()
        config = GenerationConfig.from_pretrained(path) if has_config else None
        return generate_greedy(peft, prompt, max_new_tokens, generation_config=config, **changes)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Beside:
    return Beside(tmp_path_factory.mktemp("beside"))


@pytest.fixture(scope="module")
def llm(beside: Beside) -> Iterator[LLM]:
    adapters = {name: str(path) for name, path in beside.adapters.items()}
    with LLM(str(beside.path), adapters, **SETTINGS) as llm:
        yield llm


@pytest.fixture
def adapter(beside: Beside, tmp_path: Path) -> Path:
    """The plain weights of an adapter, to put files beside."""
    path = tmp_path / "adapter"
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(beside.adapters["repeats_the_base"] / name, path)
    return path


WITH_TEMPLATE = sorted(LAYOUTS.keys() - {"repeats_the_base"})


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_chats_are_written_as_the_adapters_own_tokenizer_writes_them(
    llm: LLM, beside: Beside, name: str
) -> None:
    oracle = beside.tokenizer(name)
    for options in ({"add_generation_prompt": True}, {"continue_final_message": True}):
        chat = (
            [*CHAT, {"role": "assistant", "content": "well"}] if "continue_final_message" in options else CHAT
        )
        (output,) = llm.chat(chat, GREEDY, name, **options)
        expected = oracle.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
        expected = [token_id for token_id in expected if token_id < beside.model.config.vocab_size]
        if name == "llama_factory_pad":  # transformers writes the id of its [PAD], which has no embedding
            assert oracle.decode(output.prompt_token_ids).count("[PAD]") == 1
            assert oracle.convert_tokens_to_ids("[PAD]") not in output.prompt_token_ids
        else:
            assert output.prompt_token_ids == expected


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_prompts_and_answers_are_read_as_the_adapters_own_tokenizer_reads_them(
    llm: LLM, beside: Beside, name: str
) -> None:
    oracle = beside.tokenizer(name)
    for prompt in ("a tree is", "<|im_start|>user <think>日本</think>", "🙂 <tool_call><|im_end|>"):
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24), name)
        assert output.prompt_token_ids == oracle.encode(prompt)
        whole = oracle.decode([*output.prompt_token_ids, *output.token_ids], skip_special_tokens=True)
        assert whole == oracle.decode(output.prompt_token_ids, skip_special_tokens=True) + output.text


def test_added_tokens_are_shown_when_they_are_answered(llm: LLM, beside: Beside) -> None:
    oracle = beside.tokenizer("llama_factory_pad")
    tool = oracle.convert_tokens_to_ids("<tool_call>")
    params = SamplingParams(temperature=0, max_tokens=2, logit_bias={tool: 100.0}, ignore_eos=True)
    assert llm.generate("a", params, "llama_factory_pad")[0].text == "<tool_call><tool_call>"
    assert llm.generate("a", params, "trl_sft")[0].text == ""  # the model has no such token
    stopped = SamplingParams(temperature=0, max_tokens=5, logit_bias={tool: 100.0}, stop="call><")
    assert llm.generate("a", stopped, "llama_factory_pad")[0].text == "<tool_"


def test_a_grammar_may_be_written_in_added_tokens(llm: LLM, beside: Beside) -> None:
    oracle = beside.tokenizer("llama_factory_pad")
    ids = [oracle.convert_tokens_to_ids(token) for token in ("<think>", "</think>")]
    grammar = Grammar("lark", "start: <think> /[a-z]{1,5}/ </think>")
    params = SamplingParams(temperature=0, max_tokens=20, grammar=grammar)
    (output,) = llm.generate("a", params, "llama_factory_pad")
    assert [output.token_ids[0], *[id_ for id_ in output.token_ids if id_ == ids[1]]] == ids
    with pytest.raises(InvalidRequestError, match="grammar"):
        llm.generate("a", params, "trl_sft")


def test_the_tokenizers_end_of_sequence_ends_answers_though_nothing_else_names_it(
    llm: LLM, beside: Beside, adapter: Path
) -> None:
    prompt = llm.generate("the moon", GREEDY)[0].prompt_token_ids
    llm.load_adapter("endless", adapter)
    free = llm.generate(prompt, GREEDY, "endless")[0].token_ids
    end = free[5]
    oracle = beside.tokenizer(None)
    oracle.eos_token = oracle.convert_ids_to_tokens(end)
    oracle.save_pretrained(adapter)
    llm.load_adapter("ended", adapter, replace=True)
    params = SamplingParams(temperature=0, max_tokens=12)
    (output,) = llm.generate(prompt, params, "ended")
    ends = [AutoTokenizer.from_pretrained(adapter).eos_token_id, 0]
    assert output.token_ids == beside.generate(adapter, prompt, 12, eos_token_id=ends)
    assert (output.finish_reason, output.token_ids[-1]) == ("stop", end)
    assert llm.generate(prompt, GREEDY, "ended")[0].token_ids == free, "ignore_eos is of all of them"
    assert llm.generate(prompt, params, "endless")[0].token_ids == free[: len(free)]
    for name in ("endless", "ended"):
        llm.unload_adapter(name)


def test_a_generation_config_is_that_of_transformers_generate(
    llm: LLM, beside: Beside, adapter: Path
) -> None:
    prompt = llm.generate("how far", GREEDY)[0].prompt_token_ids
    llm.load_adapter("plain", adapter)
    free = llm.generate(prompt, GREEDY, "plain")[0].token_ids
    write_json(adapter / "generation_config.json", eos_token_id=[free[7], free[4]], do_sample=False)
    llm.load_adapter("configured", adapter)
    (output,) = llm.generate(prompt, SamplingParams(max_tokens=12), "configured")
    assert output.token_ids == beside.generate(adapter, prompt, 12)
    assert output.finish_reason == "stop"
    write_json(adapter / "generation_config.json", eos_token_id=0, max_new_tokens=3, repetition_penalty=1.3)
    llm.load_adapter("configured", adapter, replace=True)
    (output,) = llm.generate(prompt, SamplingParams(), "configured")
    assert output.token_ids == beside.generate(adapter, prompt, 3)
    assert len(llm.generate(prompt, SamplingParams(max_tokens=4), "configured")[0].token_ids) == 4
    manifest = AdapterManifest.from_fields({"sampling": {"max_tokens": 2}}, "here")
    llm.load_adapter("configured", adapter, manifest, replace=True)
    assert len(llm.generate(prompt, SamplingParams(), "configured")[0].token_ids) == 2
    for name in ("plain", "configured"):
        llm.unload_adapter(name)


def test_a_manifests_template_wins_over_the_directorys(llm: LLM, beside: Beside) -> None:
    manifest = AdapterManifest.from_fields(
        {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}, "here"
    )
    llm.load_adapter("said", beside.adapters["axolotl_chatml"], manifest)
    (output,) = llm.chat(CHAT, GREEDY, "said")
    assert output.prompt_token_ids == beside.tokenizer("axolotl_chatml").encode(CHAT[0]["content"])
    (output,) = llm.chat(CHAT, GREEDY, "said", chat_template="{{ messages[1].content }}{{ eos_token }}")
    assert beside.tokenizer("axolotl_chatml").decode(output.prompt_token_ids) == "a plant<|im_end|>"
    llm.unload_adapter("said")


def test_the_base_and_what_repeats_it_have_no_template(llm: LLM) -> None:
    for name in (None, "repeats_the_base"):
        with pytest.raises(InvalidRequestError, match="no chat template"):
            llm.chat(CHAT, GREEDY, name)
    by_name = {info.name: info.receipt for info in llm.adapters()}
    assert (by_name["repeats_the_base"].notes, by_name["repeats_the_base"].not_used) == ([], [])


def test_receipts_say_what_of_the_files_is_used(llm: LLM) -> None:
    notes = {info.name: info.receipt.notes for info in llm.adapters()}
    assert notes["llama_factory_pad"] == [
        "tokens: '[PAD]' (405) only pads, has no embedding and is left out".replace("405", str(_pad_id(llm))),
        "template: chat_template.jinja renders this adapter's chats",
        *[line for line in notes["llama_factory_pad"] if "tokenizer.json adds '<think>'" in line],
    ]
    assert any(
        "end of sequence: '<|endoftext|>' (0), '<|im_end|>'" in line for line in notes["slow_tokenizer"]
    )
    assert all(not info.receipt.not_used for info in llm.adapters())


def _pad_id(llm: LLM) -> int:
    return llm._engine.runner.vocab_size


def test_in_a_composition_what_one_brings_is_used_and_what_differs_is_refused(
    llm: LLM, beside: Beside, adapter: Path
) -> None:
    params = SamplingParams(temperature=0, max_tokens=3)
    (output,) = llm.chat(CHAT, params, {"repeats_the_base": 0.5, "unsloth_template": 0.5})
    (alone,) = llm.chat(CHAT, params, "unsloth_template")
    assert output.prompt_token_ids == alone.prompt_token_ids
    same = {"axolotl_chatml": 0.5, "slow_tokenizer": 0.5}
    with pytest.raises(
        InvalidRequestError, match="'axolotl_chatml' and 'slow_tokenizer' bring different tokens"
    ):
        llm.chat(CHAT, params, same)
    (adapter / "chat_template.jinja").write_text(CHATML)
    llm.load_adapter("templated", adapter)
    both = {"trl_sft": 1.0, "templated": 0.5}
    with pytest.raises(InvalidRequestError, match="'trl_sft' and 'templated' bring different chat templates"):
        llm.chat(CHAT, params, both)
    assert llm.generate("a", params, both)[0].token_ids  # no template is needed
    assert llm.chat(CHAT, params, both, chat_template=LLAMA2)[0].token_ids
    assert llm.chat(CHAT, params, {"trl_sft": 1.0, "templated": 0.0})[0].prompt_token_ids == (
        llm.chat(CHAT, params, "trl_sft")[0].prompt_token_ids
    )
    write_json(adapter / "generation_config.json", temperature=0.5, top_k=3)
    llm.load_adapter("warm", adapter)
    write_json(adapter / "generation_config.json", temperature=0.7)
    llm.load_adapter("warmer", adapter)
    with pytest.raises(
        InvalidRequestError, match="'warm' and 'warmer' bring different values of temperature"
    ):
        llm.generate("a", SamplingParams(max_tokens=1), {"warm": 1.0, "warmer": 0.5})
    assert llm.generate("a", params, {"warm": 1.0, "warmer": 0.5})[0].token_ids
    for name in ("templated", "warm", "warmer"):
        llm.unload_adapter(name)


def test_a_replaced_adapter_has_its_new_text_and_the_old_is_freed(
    llm: LLM, beside: Beside, adapter: Path
) -> None:
    shared = llm._engine.adapters._check._beside._shared
    before = len(shared)
    oracle = beside.tokenizer(None)
    oracle.add_tokens(["<first>"])
    oracle.save_pretrained(adapter)
    llm.load_adapter("changing", adapter)
    first = len(oracle) - 1
    assert llm.generate("<first>", GREEDY, "changing")[0].prompt_token_ids == [1, first]
    assert len(shared) == before + 1
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    llm.load_adapter("changing", adapter, replace=True)
    assert first not in llm.generate("<first>", GREEDY, "changing")[0].prompt_token_ids
    llm.unload_adapter("changing")
    assert len(shared) == before


def test_a_broken_directory_is_refused_and_disturbs_nobody(llm: LLM, beside: Beside, adapter: Path) -> None:
    expected = llm.generate("a tree", GREEDY, "trl_sft")[0].token_ids
    rows = beside.model.config.vocab_size
    tokenizer = beside.tokenizer(None)
    tokenizer.add_tokens([f"<{index}>" for index in range(NUM_FREE_ROWS + 1)])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(
        AdapterFormatError, match=rf"added tokens '<3>' \({rows}\) lie beyond the model's {rows}"
    ):
        llm.load_adapter("bad", adapter)
    content = json.loads((beside.path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {
        {"a": "b", "b": "a"}.get(text, text): id_ for text, id_ in content["model"]["vocab"].items()
    }
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(AdapterFormatError, match="the adapter was trained with another vocabulary"):
        llm.load_adapter("bad", adapter)
    assert llm.generate("a tree", GREEDY, "trl_sft")[0].token_ids == expected
    assert "bad" not in {info.name for info in llm.adapters()}
