"""The Dockerfile is clean, and what it runs is there; `make package-check` runs its scripts."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY, ROOT

DOCKER = DEPLOY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")


def hadolint() -> str | None:
    beside = Path(sys.executable).with_name("hadolint")
    return str(beside) if beside.exists() else shutil.which("hadolint")


@pytest.mark.skipif(hadolint() is None, reason="hadolint is not installed, make test-deploy has it")
def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    command = [str(hadolint()), "--config", str(DOCKER / "hadolint.yaml")]
    done = subprocess.run([*command, str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /x\n")
    assert subprocess.run(
        [*command, str(tmp_path / "Dockerfile")], capture_output=True, check=False
    ).returncode


def test_scripts_that_it_runs_are_there_and_package_check_runs_them() -> None:
    check = (ROOT / "scripts/package_check.sh").read_text()
    scripts = set(re.findall(r"\b(\w+\.sh)\b", DOCKERFILE))
    assert scripts == {"build_wheel.sh", "install.sh"}
    for script in scripts:
        subprocess.run(["sh", "-n", str(DOCKER / script)], check=True)
        assert f"deploy/docker/{script}" in check
        wrong = subprocess.run(["sh", str(DOCKER / script)], capture_output=True, text=True, check=False)
        assert (wrong.returncode, "usage:" in wrong.stderr) == (2, True)


def test_it_runs_as_nobody_special() -> None:
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE):
        if re.match(r"runtime AS ", stage):
            assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["10001:10001"]


def test_images_are_those_that_other_files_name() -> None:
    targets = set(re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, re.MULTILINE))
    texts = [path.read_text() for path in DEPLOY.rglob("*.yaml")]
    named = {tag for text in texts for tag in re.findall(r"image: loraserve:(\w+)", text)}
    assert targets == {"cpu", "cuda", "ray"}
    assert named <= targets
    assert re.findall(
        r"^  tag: (\w+)$", (DEPLOY / "helm/loraserve/values.yaml").read_text(), re.MULTILINE
    ) == ["cpu"]


def test_the_build_sees_what_the_wheel_is_made_of_and_no_more() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    allowed = [line[1:] for line in patterns if line.startswith("!")]
    for pattern in allowed:
        assert list(ROOT.glob(pattern)), pattern
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    seen = {
        path
        for path in files
        if any(path == one or path.startswith(f"{one}/") or fnmatch.fnmatch(path, one) for one in allowed)
    }
    needed = {"Cargo.lock", "LICENSE", "README.md", "pyproject.toml", "rust/py/Cargo.toml"}
    needed |= {"deploy/docker/build_wheel.sh", "deploy/docker/install.sh", "python/loraserve/llm.py"}
    assert needed <= seen
    included = re.findall(
        r'include_(?:str|bytes)!\("([^"]+)"\)', read(path for path in seen if path.endswith(".rs"))
    )
    assert included  # of the kernels, which the crate embeds
    assert {f"cuda/{Path(path).name}" for path in included if path.endswith((".cu", ".cuh"))} <= seen
    assert not [path for path in seen if path.startswith(("tests/", "benches/", "docs/"))]


def read(paths: Iterable[str]) -> str:
    return "".join((ROOT / path).read_text() for path in paths)


def test_the_health_check_says_whether_the_server_is_healthy() -> None:
    class Handler(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (text,) = re.findall(r"^HEALTHCHECK --.*?CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [part.replace(":8000", f":{server.server_port}") for part in json.loads(text)]
        command[0] = sys.executable
        assert subprocess.run(command, check=False).returncode == 0
        Handler.status = 503
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0
        server.shutdown()
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
