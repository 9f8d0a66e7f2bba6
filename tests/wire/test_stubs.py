import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_stubs", ROOT / "scripts/generate_stubs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_stubs_match_the_proto_file(generator: ModuleType) -> None:
    assert generator.outdated(ROOT / "python/loraserve/v1") == []


def test_a_changed_stub_is_noticed(generator: ModuleType, tmp_path: Path) -> None:
    for name in generator.STUBS:
        text = (ROOT / "python/loraserve/v1" / name).read_text()
        (tmp_path / name).write_text(text.replace("max_tokens", "most_tokens"))
    assert generator.outdated(tmp_path) == ["loraserve_pb2.py", "loraserve_pb2.pyi"]
