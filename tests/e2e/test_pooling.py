"""Embeddings, classes and hidden states: as transformers and PEFT compute them, mixed with answers."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.adapters.merging import read_summands
from loraserve.errors import AdapterFormatError, InvalidRequestError, NotFiniteError
from loraserve.pooling.params import PoolingParams
from loraserve.request import GenerateRequest, PoolingOutput
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.e2e.pooling_case import HEADS, NAMES, PoolingCase, classifier, make_case, train
from tests.models.tiny import make_model, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TOLERANCE = 1e-4
PROMPTS = [[11, 20, 105, 17, 92, 33, 7], [5], [3] * 100 + [8, 9], [40 + index for index in range(150)]]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolingCase]:
    case = make_case(request.param, tmp_path_factory.mktemp("pooling"))
    with case.llm:
        yield case


def close(found: npt.NDArray[np.float32], expected: Any, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(found, np.asarray(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", HEADS)
def test_classes_are_those_of_transformers_with_the_adapter(case: PoolingCase, name: str) -> None:
    for output, prompt in zip(case.llm.classify(PROMPTS, name), PROMPTS, strict=True):
        logits = case.logits(name, prompt)
        close(output.values, logits)
        assert output.probabilities is not None
        probabilities = {"several": 1 / (1 + np.exp(-logits)), "one": logits}
        softmax = np.exp(logits) / np.exp(logits).sum()
        close(output.probabilities, probabilities.get(name, softmax))
        labels = NAMES.get(name, [f"LABEL_{index}" for index in range(HEADS[name])])
        assert list(output.labels) == labels
        assert output.label == labels[int(logits.argmax())]
        assert output.usage is not None
        assert (output.usage.prompt_tokens, output.usage.completion_tokens) == (len(prompt), 0)


@pytest.mark.parametrize("name", [None, "embedder"])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_embeddings_are_those_of_transformers(case: PoolingCase, name: str | None, pooling: Any) -> None:
    pools = {"last": lambda rows: rows[-1], "mean": lambda rows: rows.mean(0), "cls": lambda rows: rows[0]}
    for prompt in PROMPTS:
        vector = pools[pooling](case.hidden(name, prompt))
        (whole,) = case.llm.embed(prompt, name, pooling=pooling)
        (raw,) = case.llm.embed(prompt, name, pooling=pooling, normalize=False)
        (cut,) = case.llm.embed(prompt, name, pooling=pooling, dimensions=10)
        close(whole.values, torch.nn.functional.normalize(vector, dim=0))
        close(raw.values, vector)
        close(cut.values, torch.nn.functional.normalize(vector[:10], dim=0))
        assert whole.values.dtype == np.float32


def test_hidden_states_of_all_tokens_are_those_of_transformers(case: PoolingCase) -> None:
    for output, prompt in zip(case.llm.encode(PROMPTS, "embedder"), PROMPTS, strict=True):
        close(output.values, case.hidden("embedder", prompt))


def test_a_prompt_may_fill_the_context_and_no_more(case: PoolingCase) -> None:
    limit = case.llm.info().max_model_len
    (output,) = case.llm.embed([[7] * limit])
    close(output.values, torch.nn.functional.normalize(case.hidden(None, [7] * limit)[-1], dim=0))
    with pytest.raises(InvalidRequestError, match=f"limit is {limit}: the context length$"):
        case.llm.embed([[7] * (limit + 1)])
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        case.llm.embed([[]])


def bits(output: PoolingOutput) -> bytes:
    return output.values.tobytes()


def test_two_heads_an_embedding_and_answers_in_one_batch_are_as_alone(case: PoolingCase) -> None:
    """Through one run of requests of all kinds, so that they share steps."""
    classify, embed = PoolingParams(task="classify"), PoolingParams()
    mean, tokens = PoolingParams(kind="mean"), PoolingParams(task="token_embed")
    kinds: list[tuple[str | None, PoolingParams | None]] = [
        ("three", classify), ("plain", None), ("seven", classify), (None, embed), ("embedder", mean),
        (None, None), ("three", None), ("embedder", tokens), ("one", classify),
    ]  # fmt: skip
    requests = [
        GenerateRequest(prompt=prompt, adapter=adapter, pooling=pooling, params=GREEDY)
        for prompt in PROMPTS
        for adapter, pooling in kinds
    ]
    together = case.llm._run.run(requests, progress=False)
    for request, output in zip(requests, together, strict=True):
        (alone,) = case.llm._run.run([request], progress=False)
        (first,), (second,) = output.completions, alone.completions
        assert first.token_ids == second.token_ids
        if request.pooling is None:
            assert len(first.token_ids) == GREEDY.max_tokens
            assert first.pooled is None
        else:
            assert first.pooled is not None
            assert second.pooled is not None
            assert first.pooled.values.tobytes() == second.pooled.values.tobytes()


def test_a_cached_prefix_serves_the_last_token_and_no_other(case: PoolingCase) -> None:
    prompt = [9, 8, 7, 6] * 20
    (first,) = case.llm.embed([prompt], cache_salt="mine")
    (again,) = case.llm.embed([prompt], cache_salt="mine")
    (mean,) = case.llm.embed([prompt], pooling="mean", cache_salt="mine")
    assert bits(first) == bits(again)
    assert first.usage is not None
    assert again.usage is not None
    assert mean.usage is not None
    cached = [output.usage.cached_tokens for output in (first, again, mean) if output.usage is not None]
    assert cached == [0, 64, 0]
    close(mean.values, torch.nn.functional.normalize(case.hidden(None, prompt).mean(0), dim=0))


def test_scores_are_cosines_or_of_a_head_of_one_label(case: PoolingCase) -> None:
    query, documents = "w5 w6 w7", ["w8 w9", "w5 w6 w7", "w10"]
    scores = case.llm.score(query, documents, "embedder")
    vectors = [output.values for output in case.llm.embed([query, *documents], "embedder")]
    close(np.asarray(scores), [vectors[0] @ vector for vector in vectors[1:]])
    assert scores[1] == pytest.approx(1.0)
    crossed = case.llm.score(query, documents, "one")
    pairs = [[5, 6, 7, 8, 9], [5, 6, 7, 5, 6, 7], [5, 6, 7, 10]]
    close(np.asarray(crossed), [case.logits("one", pair)[0] for pair in pairs])
    each = case.llm.score(["w5", "w6"], ["w6", "w5"], "one")
    close(np.asarray(each), [case.logits("one", pair)[0] for pair in ([5, 6], [6, 5])])
    with pytest.raises(InvalidRequestError, match="2 queries and 3 documents are no pairs"):
        case.llm.score(["w5", "w6"], documents)


def test_who_has_no_head_is_told_so(case: PoolingCase) -> None:
    with pytest.raises(InvalidRequestError, match="adapter 'plain' has no head to classify with"):
        case.llm.classify([[5]], "plain")
    with pytest.raises(InvalidRequestError, match="the model has no head to classify with"):
        case.llm.classify([[5]])
    with pytest.raises(InvalidRequestError, match="'three' has a head, which is no delta"):
        case.llm.classify([[5]], {"three": 0.5})
    with pytest.raises(InvalidRequestError, match="'three' has a head, which is no delta"):
        case.llm.classify([[5]], {"three": 1.0, "plain": 1.0})
    with pytest.raises(InvalidRequestError, match="dimensions is 0"):
        case.llm.embed([[5]], dimensions=0)
    with pytest.raises(InvalidRequestError, match="dimensions is 65, the model's hidden states have 64"):
        case.llm.embed([[5]], dimensions=65)


def test_an_adapter_with_a_head_generates_as_the_same_without(case: PoolingCase, tmp_path: Path) -> None:
    source = Path(case.adapters["three"])
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"modules_to_save": None, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    without = {name: tensor for name, tensor in tensors.items() if "score" not in name}
    save_file(without, tmp_path / "adapter_model.safetensors")
    receipt = case.llm.load_adapter("headless", tmp_path)
    try:
        with_head, headless = case.llm.generate([PROMPTS[0]] * 2, GREEDY, ["three", "headless"])
        assert with_head.token_ids == headless.token_ids
        (registered,) = [one for one in case.llm.adapters() if one.name == "three"]
        assert registered.receipt.hash != receipt.hash
    finally:
        case.llm.unload_adapter("headless")


def test_a_replaced_head_is_the_new_one(case: PoolingCase, tmp_path: Path) -> None:
    case.llm.load_adapter("changing", case.adapters["three"])
    try:
        (before,) = case.llm.classify([PROMPTS[0]], "changing")
        case.llm.load_adapter("changing", case.adapters["seven"], replace=True)
        (after,) = case.llm.classify([PROMPTS[0]], "changing")
        assert (len(before.values), len(after.values)) == (3, 7)
    finally:
        case.llm.unload_adapter("changing")


def test_a_head_that_overflows_is_a_typed_error(case: PoolingCase, tmp_path: Path) -> None:
    source = Path(case.adapters["three"])
    tensors = load_file(source / "adapter_model.safetensors")
    (name,) = [name for name in tensors if "score" in name]
    tensors[name] = torch.full_like(tensors[name], 3e38)
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    case.llm.load_adapter("huge", tmp_path)
    try:
        with pytest.raises(NotFiniteError, match="'huge'"):
            case.llm.classify([PROMPTS[0]], "huge")
    finally:
        case.llm.unload_adapter("huge")


def test_a_bad_config_beside_a_head_is_refused(case: PoolingCase, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((Path(case.adapters["three"]) / name).read_bytes())
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(AdapterFormatError, match="expected a JSON object"):
        case.llm.load_adapter("bad", tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_a_model_that_classifies_is_served_with_adapters(name: str, tmp_path: Path) -> None:
    """Its own head with a plain adapter, an adapter's where that has one; it generates nothing."""
    base = save_model(make_model(name), tmp_path / "base")
    path = tmp_path / "model"
    torch.manual_seed(5)
    model = classifier(base, 5)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.config.id2label = {index: f"class {index}" for index in range(5)}
    save_model(model, path)
    own = train(classifier(path, 5), "SEQ_CLS", tmp_path / "own", 1)
    plain_path = tmp_path / "plain"
    train(classifier(path, 5), None, plain_path, 2)
    adapters = {"own": str(tmp_path / "own"), "plain": str(plain_path)}
    with LLM(str(path), adapters, dtype="float32", memory="16MiB") as llm, torch.inference_mode():
        mixed = llm.classify([PROMPTS[0]] * 3, [None, "own", "plain"])
        ids = torch.tensor([PROMPTS[0]])
        close(mixed[0].values, model.eval()(input_ids=ids).logits[0])
        close(mixed[1].values, own(input_ids=ids).logits[0])
        plain = PeftModel.from_pretrained(model, plain_path)
        close(mixed[2].values, plain(input_ids=ids).logits[0])
        assert list(mixed[0].labels) == [f"class {index}" for index in range(5)]
        with pytest.raises(InvalidRequestError, match="it can't generate"):
            llm.generate([PROMPTS[0]])
        assert llm.embed([PROMPTS[0]])[0].values.shape == (64,)


def test_in_bfloat16_classes_and_embeddings_are_near(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, dtype="bfloat16")
    with case.llm:
        for prompt in PROMPTS:
            for name in HEADS:
                (output,) = case.llm.classify([prompt], name)
                logits = case.logits(name, prompt)
                assert np.abs(output.values - logits).max() < 0.05 * max(np.abs(logits).max(), 1.0)
            (output,) = case.llm.embed([prompt], "embedder", pooling="mean")
            expected = torch.nn.functional.normalize(case.hidden("embedder", prompt).mean(0), dim=0).numpy()
            assert float(output.values @ expected) > 0.999


def copied(source: str, path: Path) -> Path:
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).write_bytes((Path(source) / name).read_bytes())
    return path


def write_pooling(path: Path, **modes: bool) -> None:
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))


def test_embeddings_are_pooled_as_files_beside_the_adapter_or_the_model_say(
    case: PoolingCase, tmp_path: Path
) -> None:
    beside = copied(case.adapters["embedder"], tmp_path / "beside")
    write_pooling(beside, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    stated = copied(case.adapters["embedder"], tmp_path / "stated")
    write_pooling(stated, pooling_mode_mean_tokens=True)
    (stated / "loraserve.json").write_text(json.dumps({"pooling": "cls"}))
    model = tmp_path / "model"
    shutil.copytree(case.path, model)
    write_pooling(model, pooling_mode_mean_tokens=True)
    adapters = {"beside": str(beside), "stated": str(stated), "embedder": case.adapters["embedder"]}
    with LLM(str(model), adapters, dtype="float32", memory="16MiB") as llm:
        for name, kind in (("beside", "mean"), ("stated", "cls"), ("embedder", "mean"), (None, "mean")):
            (found,) = llm.embed([PROMPTS[0]], name)
            (expected,) = llm.embed([PROMPTS[0]], name, pooling=kind)  # type: ignore[arg-type]
            (last,) = llm.embed([PROMPTS[0]], name, pooling="last")
            assert bits(found) == bits(expected) != bits(last)
        assert llm.encode([PROMPTS[0]], "beside")[0].values.shape == (len(PROMPTS[0]), 64)


@pytest.mark.parametrize(
    ("modes", "modules", "words"),
    [
        ({"pooling_mode_max_tokens": True}, None, "asks for pooling_mode_max_tokens"),
        (
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            None,
            "asks for pooling_mode_mean",
        ),
        ({}, None, "asks for none"),
        ({"pooling_mode": "weightedmean"}, None, "asks for weightedmean"),
        ({"pooling_mode": ["mean"]}, None, "asks for"),
        ({"pooling_mode": "mean"}, [{"type": "sentence_transformers.models.Dense"}], "a module 'Dense'"),
        ({"pooling_mode": "mean"}, {"a": 1}, "is not a JSON list of objects"),
    ],
)
def test_pooling_that_is_not_served_is_refused_at_load(
    case: PoolingCase, tmp_path: Path, modes: Any, modules: Any, words: str
) -> None:
    path = copied(case.adapters["embedder"], tmp_path / "adapter")
    write_pooling(path, **modes)
    if modules is not None:
        (path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(AdapterFormatError, match=words):
        case.llm.load_adapter("other", path)


def test_the_async_engine_pools_as_the_llm(case: PoolingCase) -> None:
    embed, classify = PoolingParams(kind="mean"), PoolingParams(task="classify")
    requests = [
        GenerateRequest(prompt=prompt, adapter=adapter, pooling=pooling)
        for prompt in PROMPTS
        for adapter, pooling in (("embedder", embed), ("three", classify), (None, embed))
    ]

    async def pool() -> tuple[list[PoolingOutput], str]:
        config = EngineConfig(
            model=str(case.path),
            adapters=case.adapters,
            dtype="float32",
            memory="16MiB",
            max_batched_tokens=48,
        )
        engine = AsyncEngine(config)
        try:
            outputs = await engine.pool(requests)
            with pytest.raises(InvalidRequestError) as refused:
                await engine.pool(
                    [requests[0], GenerateRequest(prompt=[5], adapter="plain", pooling=classify)]
                )
            assert engine.stats().num_running == 0
            return outputs, str(refused.value)
        finally:
            await engine.shutdown(0.0)

    outputs, refused = asyncio.run(pool())
    assert "has no head" in refused
    for request, output in zip(requests, outputs, strict=True):
        (expected,) = case.llm._run.run([request], progress=False)
        assert expected.completions[0].pooled is not None
        assert output.prompt_token_ids == request.prompt
        assert bits(output) == expected.completions[0].pooled.values.tobytes()


def test_a_head_is_merged_into_the_model_with_its_adapter_and_with_no_other(
    case: PoolingCase, tmp_path: Path
) -> None:
    adapters = {"three": case.adapters["three"]}
    with LLM(str(case.path), adapters, dtype="float32", memory="16MiB", merge="three") as llm:
        for name in (None, "three"):
            (output,) = llm.classify([PROMPTS[0]], name)
            close(output.values, case.logits("three", PROMPTS[0]))
    paths = [case.adapters["plain"], case.adapters["three"]]
    for model in (None, str(case.path)):
        with pytest.raises(AdapterFormatError, match="it has a head to classify with"):
            read_summands(paths, [1.0, 0.5], model)
