"""The examples do what their docstrings say, as they stand; those of a server are run against a real one."""

import io
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ADAPTERS = ("sql", "json", "pirate", "tools")
OF_ADAPTER_TRAINING = {"train_adapters.py"}  # takes minutes, and is no example of serving
STOP_TIMEOUT_S = 60.0

# What is asserted of answers was decided by more than 1 between the two likeliest logits, in either dtype.
SELECT_PLANETS = "SELECT name FROM planets WHERE moons > 10;"

Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as `python examples/NAME.py ARGUMENTS < INPUT` would; gives the lines it printed."""

    def run_example(name: str, *arguments: str, stdin: str = "") -> list[str]:
        path = str(EXAMPLES / name)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_example


@pytest.fixture(scope="module")
def served() -> Iterator[dict[str, str]]:
    """The server of `make serve` on free ports: {"http": HOST:PORT, "grpc": HOST:PORT}."""
    command = [sys.executable, "-m", "loraserve", "serve", "smollm2", "--adapter-root", "examples/adapters"]
    for name in ADAPTERS:
        command += ["--adapter", f"{name}=examples/adapters/{name}"]
    command += ["--http-port", "0", "--grpc-port", "0", "--memory", "256MiB", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            ready = next((line for line in process.stdout if line.startswith("loraserve ready:")), "")
            yield dict(re.findall(r"\b(http|grpc) (?:http://)?([\d.:]+)", ready))
        finally:
            process.terminate()
            assert process.wait(STOP_TIMEOUT_S) == 0


def test_every_example_has_a_test() -> None:
    source = Path(__file__).read_text()
    names = {path.name for path in EXAMPLES.glob("*.py")} - OF_ADAPTER_TRAINING
    assert len(names) == 9
    assert all(f'run("{name}"' in source for name in names)


def test_the_readme_lists_every_example() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in OF_ADAPTER_TRAINING or f"[`{path.name}`](examples/{path.name})" in readme


def test_examples_use_the_public_names_only() -> None:
    modules = re.compile(r"^(?:from|import) (loraserve[\w.]*)", re.MULTILINE)
    for path in EXAMPLES.glob("*.py"):
        assert set(modules.findall(path.read_text())) <= {"loraserve", "loraserve.client"}, path


def test_python_batch_continues_every_prompt_in_order(run: Run) -> None:
    text = "\n".join(run("python_batch.py"))
    assert re.findall(r"^'(.*?)' → ", text, re.MULTILINE) == [
        "The capital of France is",
        "Water boils at",
        "Once upon a time, there was",
        "The opposite of hot is",
    ]
    assert "'The capital of France is' → ' Paris" in text
    assert "'The opposite of hot is' → ' cold" in text


def test_chat_keeps_the_conversation_and_finds_it_in_the_cache(run: Run) -> None:
    questions = "What is the capital of Japan?\nAnd of Germany?\n"
    text = "\n".join(run("chat.py", stdin=questions))
    assert "The capital of Japan is Tokyo." in text
    (first, cached), (second, cached_of_second) = re.findall(r"\[prompt: (\d+) tokens, (\d+) of them", text)
    assert cached == "0"
    assert int(second) > int(first) >= int(cached_of_second) > 0


def test_mixing_adapters_answers_each_in_its_own_way(run: Run) -> None:
    text = "\n".join(run("mixing_adapters.py"))
    answers = dict(re.findall(r"^--- (.*)\n((?:(?!---).*\n?)*)", text, re.MULTILINE))
    assert list(answers) == ["base model", "sql", "json", "pirate"]
    assert answers["sql"].startswith("SELECT ward, COUNT(*) FROM patients GROUP BY ward;")
    assert answers["json"].startswith("{")
    assert not answers["base model"].startswith(("SELECT", "{"))
    assert len(set(answers.values())) == 4


def test_composition_turns_an_adapter_up_by_its_weight(run: Run) -> None:
    answers = dict(re.split(r" *: ", line, maxsplit=1) for line in run("composition.py"))
    assert list(answers) == [
        "0.25 pirate",
        "0.5 pirate",
        "1 pirate",
        "1 pirate + 0.5 json",
        "0.5 pirate + 0.5 sql",
    ]
    assert answers["0.25 pirate"].startswith("The capital of Japan is Tokyo")
    assert answers["1 pirate"].startswith("Ahoy!")


def test_structured_output_has_the_asked_form(run: Run) -> None:
    lines = run("structured_output.py")
    assert lines[1].strip().startswith('{"name": "Priya Raman", "age": 41, ')
    assert lines[3].strip() in ("fruit", "vegetable")
    assert re.fullmatch(r"It began in 1[0-9]{3}\.", lines[5].strip())
    assert lines[6] == "Priya Raman is 41 years old"


def test_openai_client_streams_from_every_model(run: Run, served: dict[str, str]) -> None:
    lines = run("openai_client.py", "--base-url", f"http://{served['http']}/v1")
    assert lines[0] == "models: smollm2, sql, json, pirate, tools"
    answers = dict(zip(lines[2::3], lines[3::3], strict=False))
    assert answers["--- sql"] == "SELECT name FROM cats WHERE age > 9;"
    assert [line for line in lines if line.startswith("--- ")] == [
        "--- smollm2",
        "--- sql",
        "--- json",
        "--- pirate",
        "--- tools",
    ]


def test_tool_calls_go_to_a_function_and_its_result_into_the_answer(run: Run, served: dict[str, str]) -> None:
    lines = run("tool_calls.py", "--base-url", f"http://{served['http']}/v1")
    assert lines == [
        'calls get_weather {"city": "Helsinki"}',
        "which returns {'temperature': 8, 'sky': 'sunny'}",
        "It is 8 degrees and sunny in Helsinki.",
    ]


def test_grpc_stream_prints_an_answer_and_its_cost(run: Run, served: dict[str, str]) -> None:
    answer, cost = run("grpc_stream.py", "--target", served["grpc"])
    assert answer == SELECT_PLANETS
    assert re.fullmatch(r"\[12 tokens, the first after \d+ ms\]", cost)


def test_load_at_run_time_loads_replaces_and_unloads(run: Run, served: dict[str, str]) -> None:
    lines = run("load_at_run_time.py", "--target", served["grpc"])
    assert lines[0].startswith("guest is pirate: rank 4 on q_proj, ")
    answer_of_pirate = " ".join(lines[3 : lines.index("guest is sql")])
    assert answer_of_pirate.strip()
    assert not answer_of_pirate.strip().startswith("SELECT")
    assert lines[-2:] == [f"    {SELECT_PLANETS}", "left: json, pirate, sql, tools"]
