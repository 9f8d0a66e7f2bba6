"""One server on the demo model with three adapters, for all tests of this folder; and what it must answer."""

from collections.abc import Iterator

import pytest
from loraserve import LLM, AsyncEngine, EngineConfig, SamplingParams
from loraserve.request import AdapterSpec

from tests.peft_writer import SMOLLM2_135M, write_adapter
from tests.server.http.http_thread import HttpThread

EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STORY = "Once upon a time"
CHAT = [{"role": "user", "content": "Name a colour."}]
NUM_TOKENS = 8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
NAMES: list[str | None] = [None, "small", "large", "partial"]
SUM = {"small": 0.5, "large": 0.5}


@pytest.fixture(scope="session")
def http_adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("http-adapters")
    paths = {
        "small": write_adapter(folder / "small", SMOLLM2_135M, rank=4, scale=0.2, seed=1),
        "large": write_adapter(
            folder / "large", SMOLLM2_135M, rank=32, modules=EVERYTHING, scale=0.1, seed=2
        ),
        "partial": write_adapter(folder / "partial", SMOLLM2_135M, layers=[3, 20], scale=1.0, seed=3),
    }
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="session")
def engine_config(http_adapters: dict[str, str]) -> EngineConfig:
    return EngineConfig(
        model="smollm2",
        adapters=http_adapters,
        dtype="float32",
        quantization="none",
        memory="512MiB",
        max_model_len=2048,
    )


class Expected:
    """Answers of the Python API, greedy, by adapter name; `None` is the base model and "sum" is SUM."""

    def __init__(self, llm: LLM) -> None:
        specs: list[AdapterSpec] = [*NAMES, SUM]
        names: list[str | None] = [*NAMES, "sum"]
        story = llm.generate([STORY] * len(specs), GREEDY, adapter=specs)
        chat = llm.chat([CHAT] * len(specs), GREEDY, adapter=specs)
        self.story = {name: one.text for name, one in zip(names, story, strict=True)}
        self.story_ids = {name: one.token_ids for name, one in zip(names, story, strict=True)}
        self.chat = {name: one.text for name, one in zip(names, chat, strict=True)}


@pytest.fixture(scope="session")
def expected(engine_config: EngineConfig) -> Expected:
    with LLM(
        engine_config.model,
        engine_config.adapters,
        dtype=engine_config.dtype,
        quantization=engine_config.quantization,
        memory=engine_config.memory,
        max_model_len=engine_config.max_model_len,
    ) as llm:
        return Expected(llm)


@pytest.fixture(scope="session")
def server(engine_config: EngineConfig, expected: Expected) -> Iterator[HttpThread]:
    with HttpThread(lambda: AsyncEngine(engine_config), served_names=("smollm2",)) as server:
        yield server
