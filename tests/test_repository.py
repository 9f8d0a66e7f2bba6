"""The files that tools and newcomers start from agree with what they stand for: hooks, lock, hosted CI."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WITH_TORCH = {"torch"}  # its build is chosen, not locked
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def recipe(target: str) -> tuple[list[str], str]:
    """(prerequisites, commands) of a target of the Makefile."""
    found = re.search(rf"^{target}:([^#\n]*).*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None, target
    return found.group(1).split(), found.group(2)


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def hooks() -> list[dict[str, Any]]:
    (local,) = load_yaml(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    return local["hooks"]


def test_the_hooks_together_run_what_make_lint_runs() -> None:
    parts, commands = recipe("lint")
    assert not commands
    assert len(parts) >= 3
    assert [hook["entry"] for hook in hooks()] == [f"make {part}" for part in parts]
    assert all(recipe(part)[1] for part in parts)
    assert not any(hook["pass_filenames"] for hook in hooks())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("rust/core/src/lib.rs", {"lint-rust"}),
        ("rust/py/src/lib.rs", {"lint-rust", "lint-python"}),
        ("Cargo.toml", {"lint-rust"}),
        ("tests/conftest.py", {"lint-python"}),
        ("python/loraserve/_core.pyi", {"lint-python"}),
        ("proto/loraserve/v1/loraserve.proto", {"lint-python"}),
        ("cuda/norm.cu", {"lint-cuda"}),
        ("README.md", set()),
    ],
)
def test_a_changed_file_calls_the_hooks_of_its_language(path: str, expected: set[str]) -> None:
    assert (ROOT / path).exists()
    assert {hook["id"] for hook in hooks() if re.search(hook["files"], path)} == expected


def lock() -> list[Requirement]:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_a_version_in_every_range_of_pyproject(python: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11 and later
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    versions: dict[str, str] = {}
    for pin in lock():
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in versions, f"{pin.name} has two versions for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            versions[pin.name] = specifier.version
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        if wanted.name in WITH_TORCH:
            assert wanted.name not in versions
        else:
            assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), (
                f"{line}: run make lock"
            )


def test_the_lock_names_no_place_and_no_build() -> None:
    for pin in lock():
        assert pin.url is None
        assert "+" not in str(pin.specifier)
        assert not pin.name.startswith(("torch", "nvidia-", "triton"))


def test_hosted_ci_runs_every_step_of_ours_with_pinned_actions() -> None:
    workflow = load_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    uses = [step["uses"] for step in job["steps"] if "uses" in step]
    assert uses
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one) for one in uses)
    assert job["steps"][-1]["run"] == ".ci/run ${{ matrix.step }}"
    runs = job["strategy"]["matrix"]["include"]
    assert {run["step"] for run in runs} == {"lint", "test"}
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert oldest.group(1) in [run["python"] for run in runs if run["step"] == "test"]
    assert workflow["permissions"] == {"contents": "read"}


def test_ci_refuses_a_step_it_does_not_have() -> None:
    ci = subprocess.run([ROOT / ".ci" / "run", "deploy"], capture_output=True, text=True, check=False)
    assert (ci.returncode, ci.stdout) == (2, "")
    assert ci.stderr == "unknown step 'deploy', give lint, test or nothing for both\n"
