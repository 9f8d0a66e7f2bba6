"""The workflows: actions pinned, few permissions, and wheels for what is promised."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.files import ROOT, loaded

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
RELEASE = loaded(ROOT / ".github/workflows/release.yml")


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_nobody_may_write(path: Path) -> None:
    workflow = loaded(path)
    assert workflow["permissions"] == {"contents": "read"}
    for action in re.findall(r"uses: (\S+)( # v\S+)?$", path.read_text(), re.MULTILINE):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action[0]), action
        assert action[1], action
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_wheels_are_built_for_every_platform_and_published_without_a_token() -> None:
    built = {
        one["target"]: one["runner"] for one in RELEASE["jobs"]["wheel"]["strategy"]["matrix"]["include"]
    }
    assert built == {  # a runner that GitHub has given up waits for ever, and nothing is published
        "x86_64-unknown-linux-gnu": "ubuntu-24.04",
        "aarch64-unknown-linux-gnu": "ubuntu-24.04-arm",
        "aarch64-apple-darwin": "macos-15",
    }
    publish = RELEASE["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == ["wheel", "sdist"]
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


def test_scripts_that_are_run_are_there() -> None:
    for step in steps(RELEASE):
        for script in re.findall(r"[\w/.]+\.sh", step.get("run", "")):
            assert (ROOT / script).is_file(), script


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint_finds_nothing() -> None:
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
