"""`--merge`: one adapter in the model's weights, as PEFT's merge_and_unload computes them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.merged_weights import MergedAdapter, MergedWeights
from loraserve.cli.main import main
from loraserve.errors import AdapterFormatError, AdapterNotFoundError, InvalidRequestError
from loraserve.loader import open_checkpoint
from loraserve.settings.entries import ApiKey
from loraserve.settings.errors import ConfigError
from loraserve.settings.load import load_settings
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.e2e.oracle import greedy_tokens
from tests.server.http.http_thread import HttpThread

# PEFT takes the bias of lora_B for a matrix that was not gathered, and says that it could not merge one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter .* invalid shape"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
]

PROMPT = [11, 22, 33, 44, 55, 66]
NUM_TOKENS = 8
PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 5, "lora_alpha": 20, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "layers_to_transform": [1],
        "rank_pattern": {"down_proj": 9},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora": {"r": 8, "use_dora": True, "target_modules": "all-linear"},
    "bias_all": {"r": 8, "bias": "all", "target_modules": ["q_proj", "o_proj"]},
    "lora_bias": {"r": 8, "lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "lora_bias_on_unbiased": {"r": 8, "lora_bias": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, hf_smollm2_tokenizer: Any) -> Path:
    """A Qwen2, whose q, k and v have biases; heads of 20, so that no module ends with a panel."""
    path = tmp_path_factory.mktemp("merge") / "model"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(hf_smollm2_tokenizer),
        hidden_size=80,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    base = Qwen2ForCausalLM(config)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    base.save_pretrained(path)
    hf_smollm2_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, str]:
    """As PEFT saves them; all that it trains is random."""
    paths = {}
    for seed, (name, settings) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        for key, parameter in peft.named_parameters():
            if "lora_magnitude" in key:
                parameter.data *= 0.5 + torch.rand_like(parameter)
            elif "lora_" in key or (parameter.requires_grad and key.endswith("bias")):
                torch.nn.init.normal_(parameter, std=0.2)
        paths[name] = str(model.parent / name)
        peft.save_pretrained(paths[name])
    return paths


def peft(model: Path, adapter: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


def merged(checkpoint: Any, adapter: str, dtype: torch.dtype) -> MergedWeights:
    return MergedWeights(checkpoint, MergedAdapter("a", adapter, None, ("base",), 64), dtype)


def llm(model: Path, name: str, path: str, **settings: Any) -> LLM:
    settings = {"dtype": "float32", "memory": "8MiB", "max_num_seqs": 8, **settings}
    return LLM(str(model), {name: path}, merge=name, **settings)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "lora_bias_on_unbiased"])
def test_weights_are_those_of_merge_and_unload(model: Path, adapters: dict[str, str], kind: str) -> None:
    expected = peft(model, adapters[kind]).merge_and_unload().state_dict()
    num_changed = 0
    with open_checkpoint(model) as checkpoint:
        weights = merged(checkpoint, adapters[kind], torch.float32)
        rounded = merged(checkpoint, adapters[kind], torch.bfloat16)
        for name in checkpoint.names():
            shape = checkpoint.shape(name)
            tensor = weights.tensor(name, shape)
            torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6, msg=name)
            if not torch.equal(tensor, checkpoint.tensor(name)):
                num_changed += 1
                assert torch.equal(rounded.tensor(name, shape), tensor.to(torch.bfloat16))
    assert num_changed >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_pefts_by_name_and_without_one(model: Path, adapters: dict[str, str], kind: str) -> None:
    with llm(model, "mine", adapters[kind]) as served:
        outputs = served.generate([PROMPT] * 3, PARAMS, [None, "mine", {"mine": 1.0}])
        (info,) = served.adapters()
        assert served.info().num_adapter_loads == 0
    answer = outputs[0].token_ids
    assert [output.token_ids for output in outputs] == [answer] * 3
    assert greedy_tokens(peft(model, adapters[kind]), PROMPT, answer) == answer
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert greedy_tokens(base, PROMPT, answer) != answer
    assert (info.name, info.state, info.nbytes, info.usage.num_requests) == ("mine", "resident", 0, 3)
    assert "merged into the model's weights (--merge)" in info.receipt.notes


def test_a_quantised_base_is_dequantised_and_summed_in_float32(smollm2_path: str) -> None:
    adapter = "examples/adapters/sql"
    name, shape = "model.layers.4.self_attn.q_proj.weight", (576, 576)
    with open_checkpoint(smollm2_path) as checkpoint:
        tensor = merged(checkpoint, adapter, torch.bfloat16).tensor(name, shape)
        base = checkpoint.tensor(name, shape)
        other = merged(checkpoint, adapter, torch.bfloat16).tensor(
            name.replace("q_proj", "k_proj"), (192, 576)
        )
        assert torch.equal(other, checkpoint.tensor(name.replace("q_proj", "k_proj")))
    from safetensors.torch import load_file  # noqa: PLC0415

    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    path = "base_model.model.model.layers.4.self_attn.q_proj.lora_{}.weight"
    a, b = (tensors[path.format(half)].float() for half in "AB")
    assert torch.equal(tensor, (base + b @ a * 2.0).to(torch.bfloat16))
    assert not torch.equal(tensor, base.to(torch.bfloat16))


@pytest.fixture(scope="module")
def served(model: Path, adapters: dict[str, str]) -> Iterator[LLM]:
    with llm(model, "mine", adapters["plain"]) as served:
        yield served


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ({"mine": 0.5}, InvalidRequestError, r"'mine' is in the model's weights \(--merge\).*weight 0\.5"),
        ({"mine": 0.0}, InvalidRequestError, "weight 0 can't be had"),
        ({"mine": 1.0, "other": 1.0}, InvalidRequestError, "'other' of weight 1 can't be had"),
        ("other", AdapterNotFoundError, "'other'"),
    ],
)
def test_what_is_not_the_merged_adapter_is_refused(
    served: LLM, spec: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        served.generate([PROMPT], PARAMS, spec)
    assert len(served.generate([PROMPT], PARAMS)[0].token_ids) == NUM_TOKENS


def test_nothing_is_loaded_beside_it_nor_taken_out(served: LLM, adapters: dict[str, str]) -> None:
    for name in ("mine", "other"):
        with pytest.raises(InvalidRequestError, match=r"can't be loaded.*--merge"):
            served.load_adapter(name, adapters["dora"], replace=True)
    with pytest.raises(InvalidRequestError, match=r"can't be unloaded.*--merge"):
        served.unload_adapter("mine")
    assert served.warm_adapter("mine") == 0.0
    served.pin_adapter("mine")
    assert [info.name for info in served.adapters()] == ["mine"]


def test_an_adapter_that_acts_from_its_invocation_on_is_refused(
    model: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    invoked = tmp_path / "invoked"
    invoked.mkdir()
    for file in Path(adapters["plain"]).glob("adapter_*"):
        (invoked / file.name).write_bytes(file.read_bytes())
    config = json.loads((invoked / "adapter_config.json").read_text())
    (invoked / "adapter_config.json").write_text(json.dumps(config | {"alora_invocation_tokens": [5]}))
    with pytest.raises(AdapterFormatError, match=r"'mine' can't be merged.*alora_invocation_tokens"):
        llm(model, "mine", str(invoked))
    with pytest.raises(AdapterFormatError, match="does not exist|No such file|missing"):
        llm(model, "mine", str(tmp_path / "none"), on_adapter_error="skip")


def test_an_adapter_that_changes_embedding_or_head_is_refused(model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 3])
    peft = get_peft_model(base, config)
    for name, parameter in peft.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 1.0
    peft.save_pretrained(tmp_path / "tokens")
    with pytest.raises(AdapterFormatError, match="changes embedding, head or norms .* can't be merged yet"):
        llm(model, "mine", str(tmp_path / "tokens"))


def test_copies_of_the_base_s_embeddings_beside_it_are_left_out(
    model: Path, adapters: dict[str, str], tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    peft(model, adapters["plain"]).save_pretrained(copied, save_embedding_layers=True)
    with open_checkpoint(model) as checkpoint:
        weights, plain = (
            merged(checkpoint, str(path), torch.float32) for path in (copied, adapters["plain"])
        )
        assert weights.files.receipt.base_copies
        for name in checkpoint.names():
            shape = checkpoint.shape(name)
            assert torch.equal(weights.tensor(name, shape), plain.tensor(name, shape))


def test_its_manifest_counts_for_requests_without_a_name(model: Path, adapters: dict[str, str]) -> None:
    manifest = AdapterManifest(sampling={"max_tokens": 3, "temperature": 0.0, "ignore_eos": True})
    with llm(model, "mine", adapters["plain"], manifests={"mine": manifest}) as served:
        assert len(served.generate([PROMPT], SamplingParams())[0].token_ids) == 3


def test_a_server_answers_with_it_whatever_names_it_and_takes_no_other(
    model: Path, adapters: dict[str, str]
) -> None:
    keys = [
        ApiKey(name="named", secret="named", adapters=("mine",), base_model=False),
        ApiKey(name="root", secret="root", is_admin=True),
    ]
    config = EngineConfig(
        model=str(model), adapters={"mine": adapters["plain"]}, merge="mine", dtype="float32", memory="8MiB"
    )
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    with (
        HttpThread(lambda: AsyncEngine(config), keys=keys, adapter_roots=[model.parent]) as server,
        httpx.Client(base_url=server.url, timeout=60.0) as client,
    ):

        def post(path: str, key: str, **fields: Any) -> httpx.Response:
            return client.post(path, json=fields, headers={"authorization": f"Bearer {key}"})

        texts = [
            post("/v1/completions", key, model=name, **body).json()["choices"][0]["text"]
            for key, name in (("root", "base"), ("root", "mine"), ("named", "mine"))
        ]
        assert len(set(texts)) == 1
        assert post("/v1/completions", "named", model="base", **body).status_code == 403
        refused = post("/adapters", "root", name="other", source=adapters["dora"])
        assert (refused.status_code, "--merge" in refused.text) == (400, True)
        (listed,) = client.get("/adapters", headers={"authorization": "Bearer root"}).json()["adapters"]
    with llm(model, "mine", adapters["plain"]) as served:
        assert served.generate([PROMPT], PARAMS)[0].text == texts[0]
    assert (listed["name"], listed["requests"], listed["pinned"]) == ("mine", 3, True)


def test_the_command_line_merges_what_adapter_gives(
    model: Path, adapters: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", str(model), "--dtype", "float32", "--memory", "8MiB", "-p", "Hello", "--ignore-eos"]
    common += ["--max-tokens", "4", "--temperature", "0", "--adapter", f"mine={adapters['plain']}"]
    answers = []
    for more in (["--merge", "mine"], ["--merge", "mine", "-a", "mine"], ["-a", "mine"]):
        assert main([*common, *more]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1
    assert main([*common, "--adapter", f"other={adapters['dora']}", "--merge", "mine"]) == 1
    assert "'other' can't be served beside it" in capsys.readouterr().err
    settings = {"model": "m", "adapters": {"a": "/a", "b": "/b"}, "merge": "a"}
    with pytest.raises(ConfigError, match="'b' can't be served beside it"):
        load_settings(settings, {})
    assert load_settings({**settings, "adapters": {"a": "/a"}}, {}).settings.merge == "a"
