"""`loraserve config check`, on files that are well and files that are not."""

from pathlib import Path

import pytest
from loraserve.cli import main

from tests.peft_writer import SMOLLM2_135M, llama_shape, write_adapter


def check(tmp_path: Path, text: str) -> int:
    (tmp_path / "loraserve.yaml").write_text(text)
    return main(["config", "check", str(tmp_path / "loraserve.yaml")])


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapters/sql", SMOLLM2_135M, rank=8)
    write_adapter(tmp_path / "adapters/narrow", llama_shape(4, 128, 4, 2, 32, 256))
    return tmp_path / "adapters"


def test_what_a_file_means_is_printed(
    tmp_path: Path, adapters: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
model: smollm2
adapters: {sql: adapters/sql, chat: org/chat@main}
grpc_port: off
keys: [{name: sales, secret: hush, adapters: [sql]}, {name: root, secret: hush2, admin: true}]
adapter_root: adapters
"""
    assert check(tmp_path, text) == 0
    rows = dict(
        line.split(None, 1) for line in capsys.readouterr().out.replace("adapter ", "adapter-").splitlines()
    )
    assert (rows["model"], rows["http"], rows["grpc"]) == ("smollm2", "http://127.0.0.1:8000", "off")
    assert rows["keys"] == "sales (sql), root (admin)"
    assert rows["roots"] == str(adapters)
    assert rows["adapter-sql"].startswith(f"{adapters / 'sql'}: rank 8, ")
    assert rows["adapter-chat"] == "org/chat@main, not checked: it or the model is on the Hub"


def test_what_has_no_effect_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "trt_llm: {build: {checkpoint_repository: {repo: org/base}, max_beam_width: 1}}"
    assert check(tmp_path, text) == 0
    assert "note       trt_llm.build.max_beam_width has no effect here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("model: smollm2\nadapters: {a: adapters/narrow}", "adapter wants in_features 128"),
        ("model: smollm2\nadapters: {a: {path: adapters/none}}", "adapters/none"),
        ("model: smollm2\nmax_lora_rank: 4\nadapters: {a: adapters/sql}", "rank 8"),
        ("model: smollm2\nadapters: {a: {path: adapters/sql, manifest: {colour: red}}}", "colour"),
        ("model: smollm2\nadapters: {a: adapters/narrow}", "adapter 'a' of "),
        ("model: smollm2\nmemory: lots", "memory is 'lots'"),
        (
            "model: smollm2\nmax_num_seqs: 0",
            "max_num_seqs: input should be greater than or equal to 1, got 0",
        ),
        ("model: smollm2\nkeys_file: none.yaml", "none.yaml can't be read"),
        ("model: smollm2\ntls_key: a\ntls_certificate: b", "TLS file"),
        ("model: ./none", "none does not exist"),
        ("model: ./none\nadapters: {a: adapters/sql}", "none does not exist"),
        ("model: smollm2\nhttp_prot: 1", "did you mean http_port?"),
    ],
)
def test_what_is_wrong_is_one_line_and_exits_with_1(
    tmp_path: Path, adapters: Path, capsys: pytest.CaptureFixture[str], text: str, error: str
) -> None:
    assert check(tmp_path, text) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("loraserve: error: ")
    assert error in lines[0]
