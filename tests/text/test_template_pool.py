"""Templates that take too much end alone, with a typed error, and the next one is rendered."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from loraserve.confined.pool import ConfinedError
from loraserve.errors import InvalidRequestError
from loraserve.text.chat_template import ChatTemplate
from loraserve.text.template_pool import TemplatePool, shared_pool

MESSAGES = [{"role": "user", "content": "hi"}]
GOOD = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
DOUBLING = """{% set ns = namespace(x='x') %}
{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"""


@pytest.fixture(scope="module")
def pool() -> TemplatePool:
    return TemplatePool(2, cpu_limit_s=10.0)


@pytest.fixture(scope="module")
def hasty_pool() -> TemplatePool:
    return TemplatePool(1, cpu_limit_s=0.2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("{{ 'a'.center(4*10**9) }}", "more than 512 MiB of memory", id="one large call"),
        pytest.param(DOUBLING, "more than 512 MiB of memory", id="doubling"),
        pytest.param("{{ raise_exception('no tools here') }}", "no tools here", id="refused"),
        pytest.param("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion", id="recursion"),
    ],
)
def test_what_fails_says_why_and_the_next_is_rendered(pool: TemplatePool, source: str, message: str) -> None:
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match=f"chat template refused the messages: .*{message}"):
            ChatTemplate(source, {}, pool).render(MESSAGES)
    assert ChatTemplate(GOOD, {}, pool).render(MESSAGES) == "user: hi\n"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ 10**(10**9) }}", id="one long call"),
        pytest.param(
            "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}", id="loops"
        ),
    ],
)
def test_what_computes_for_too_long_is_stopped_and_the_next_is_rendered(
    hasty_pool: TemplatePool, source: str
) -> None:
    with pytest.raises(InvalidRequestError, match=r"longer than 0\.2 s of computing"):
        ChatTemplate(source, {}, hasty_pool).render(MESSAGES)
    assert ChatTemplate(GOOD, {}, hasty_pool).render(MESSAGES) == "user: hi\n"


def test_a_text_beyond_the_limit_is_refused(pool: TemplatePool) -> None:
    with pytest.raises(ConfinedError, match="bytes, the limit is 67108864"):
        pool.render("{{ 'ab' * (2**25 + 1) }}", {})
    assert pool.render("{{ x }}", {"x": "a" * 10**6}) == "a" * 10**6


def test_values_come_through_as_they_are(pool: TemplatePool) -> None:
    values = {"a": (1, 2.5, None, True), "b": {"c": ["ä", "\ud800", "\n"]}, "big": 2**70, "inf": float("inf")}
    shown = pool.render("{{ values }}", {"values": values})
    assert shown == str(values)


def test_threads_render_at_once_and_none_gets_anothers_text(pool: TemplatePool) -> None:
    def render(index: int) -> str:
        return pool.render("{{ x }}" * 3, {"x": index})

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(render, range(200))) == [str(index) * 3 for index in range(200)]


def test_a_template_that_computes_leaves_the_python_of_the_engine_free() -> None:
    pool = TemplatePool(1, cpu_limit_s=0.2)
    pool.render("", {})
    failures: list[Exception] = []

    def spin() -> None:
        try:
            pool.render("{{ 10**(10**9) }}", {})
        except ConfinedError as error:
            failures.append(error)

    thread = threading.Thread(target=spin)
    thread.start()
    num_turns = 0
    while thread.is_alive():
        num_turns += 1
        time.sleep(0.01)
    assert failures
    assert num_turns > 10  # in this process the one call would have held the GIL all the time


def test_a_forked_child_has_processes_of_its_own() -> None:
    assert shared_pool().render("{{ 1 + 1 }}", {}) == "2"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, shared_pool().render("{{ 'child' }}", {}).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        assert answer.read() == b"child"
    assert os.waitpid(child, 0)[1] == 0
    assert shared_pool().render("{{ 2 + 2 }}", {}) == "4"
