"""Which base an adapter says it was trained on, compared with the one that is served."""

import os
from pathlib import Path

import pytest
from loraserve.adapters.manifest import AdapterManifest
from loraserve.adapters.served_base import ServedBase
from loraserve.errors import AdapterFormatError

STAMP, OTHER = "base1:" + "ab" * 32, "base1:" + "cd" * 32
SNAPSHOT = "/cache/hub/models--meta-llama--Llama-3-8B-Instruct/snapshots/" + "0" * 40
HUB, LOCAL, GGUF = (
    "meta-llama/Llama-3-8B-Instruct",
    "/models/Llama-3-8B-Instruct",
    "/m/llama-3-8b-instruct.Q4_K_M.gguf",
)


@pytest.mark.parametrize(
    ("served", "path", "recorded", "expected"),
    [
        (HUB, SNAPSHOT, HUB, True),
        (HUB, SNAPSHOT, "META-LLAMA/llama-3-8b-instruct/", True),
        (HUB, SNAPSHOT, " https://huggingface.co/meta-llama/Llama-3-8B-Instruct", True),
        (HUB, SNAPSHOT, LOCAL, True),
        (HUB, SNAPSHOT, "C:\\models\\Llama-3-8B-Instruct\\", True),
        (HUB, SNAPSHOT, "./Llama-3-8B-Instruct", True),
        (HUB, SNAPSHOT, SNAPSHOT.replace("/cache", "/home/alice/.cache") + "/", True),
        (LOCAL, LOCAL, HUB, True),
        (LOCAL, LOCAL, SNAPSHOT, True),
        (GGUF, GGUF, HUB, True),
        (HUB, SNAPSHOT, "meta-llama/Llama-3-8B", False),
        (HUB, SNAPSHOT, "somebody/Llama-3-8B-Instruct", False),
        (HUB, SNAPSHOT, SNAPSHOT.replace("8B-Instruct", "8B"), False),
        (HUB, SNAPSHOT, "/models/Llama-3-8B", False),
        (LOCAL, LOCAL, "/models/checkpoint-500", False),
        (GGUF, GGUF, "meta-llama/Llama-3-8B", False),
        ("smollm2", "/cache/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("smollm2", "/cache/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-360M-Instruct", False),
        *((HUB, SNAPSHOT, nothing, None) for nothing in (None, "", "  ", "None", "null", "unknown")),
        (HUB, SNAPSHOT, "a\0b", False),
    ],
)
def test_a_name_means_the_base_or_another_or_says_nothing(
    served: str, path: str, recorded: str | None, expected: bool | None
) -> None:
    assert ServedBase(Path(path), STAMP, (served,)).is_named(recorded) is expected


def test_a_path_of_this_machine_means_the_directory_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one/base", "two/base"):
        (tmp_path / name).mkdir(parents=True)
    os.symlink(tmp_path / "one/base", tmp_path / "link")
    base = ServedBase(tmp_path / "one/base", STAMP, (str(tmp_path / "one/base"),))
    assert base.is_named(str(tmp_path / "one/../one/base/")) is True
    assert base.is_named(str(tmp_path / "link")) is True
    assert base.is_named(str(tmp_path / "two/base")) is False
    monkeypatch.chdir(tmp_path)
    assert base.is_named("link") is True


def test_names_of_the_operator_count_as_well() -> None:
    base = ServedBase(Path("/srv/model"), STAMP, ("/srv/model", HUB))
    assert base.is_named(HUB) is True
    assert base.is_named("meta-llama/Llama-3-8B") is False


def test_a_stamp_counts_and_the_name_does_not() -> None:
    base = ServedBase(Path(SNAPSHOT), STAMP, (HUB,))
    own = base.compare("/a", AdapterManifest(base_fingerprint=STAMP), "other/model")
    assert (own.verdict, own.warning) == ("the one it is stamped for", None)
    with pytest.raises(AdapterFormatError) as refused:
        base.compare("/a", AdapterManifest(base_fingerprint=OTHER), HUB)
    assert all(text in str(refused.value) for text in ("/a", STAMP, OTHER, HUB, "stamp --replace"))
    with pytest.raises(AdapterFormatError, match="another version of loraserve"):
        base.compare("/a", AdapterManifest(base_fingerprint="base2:" + "0" * 64), HUB)


def test_without_a_stamp_another_name_is_a_warning_that_names_both() -> None:
    base = ServedBase(Path(SNAPSHOT), STAMP, (HUB,))
    other = base.compare("/a", AdapterManifest(), "other/model")
    assert other.warning is not None
    assert "'other/model'" in other.warning
    assert f"'{HUB}'" in other.warning
    assert other.verdict == "ANOTHER by name: its config names 'other/model'"
    assert base.compare("/a", AdapterManifest(), HUB).warning is None
    assert base.compare("/a", AdapterManifest(), None).warning is None
