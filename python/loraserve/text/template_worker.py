"""The process that renders templates: what transformers shows them, in a sandbox, within limits of its own.

It reads requests from its standard input until that ends, and writes answers to its standard output:

    request: 8 bytes, its length; marshal of ("render" or "names", source of the template, variables)
    answer:  8 bytes, its length; "+" and UTF-8 text, or "-" and the error's text

A process is the only place where a template can be stopped in the middle of one call, and its memory bounded.
"""

from __future__ import annotations

import json
import marshal
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loraserve.text.template_pool import ENCODING_ERRORS, LENGTH_NBYTES

NUM_COMPILED = 64  # templates kept ready, some hundred kilobytes each
MEMORY_NBYTES = 512 * 2**20  # beside what the process has at its start
NICE = 5  # whoever generates comes first, and texts are rendered nevertheless


def main() -> None:
    """Answers requests; `cpu_limit_s` is the first argument."""
    cpu_limit_s = float(sys.argv[1])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    _restrict()
    while (request := read_message(requests)) is not None:
        # The default action of SIGPROF ends the process, inside a call of C as well.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        answer = _answer(*marshal.loads(request))
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        write_message(answers, answer)


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message, None where the stream ends."""
    head = stream.read(LENGTH_NBYTES)
    if len(head) < LENGTH_NBYTES:
        return None
    nbytes = int.from_bytes(head, "little")
    data = stream.read(nbytes)
    return data if len(data) == nbytes else None


def write_message(stream: BinaryIO, data: bytes) -> None:
    """As `read_message` reads it."""
    stream.write(len(data).to_bytes(LENGTH_NBYTES, "little"))
    stream.write(data)
    stream.flush()


def _restrict() -> None:
    with open("/proc/self/statm") as file:
        nbytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = nbytes + MEMORY_NBYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(what, (0, 0))
    os.nice(NICE)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to the whole group; the owner decides


def _answer(what: str, source: str, variables: dict[str, Any]) -> bytes:
    try:
        if what == "render":
            text = _compiled(source).render(variables)
        else:
            text = "\n".join(meta.find_undeclared_variables(_environment().parse(source)))
        return b"+" + text.encode(errors=ENCODING_ERRORS)
    except MemoryError:
        return f"-it takes more than {MEMORY_NBYTES >> 20} MiB of memory".encode()
    except Exception as error:  # a template may raise anything
        return b"-" + str(error).encode(errors=ENCODING_ERRORS)


@lru_cache(maxsize=NUM_COMPILED)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; its body is a scope of its own."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of the type, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that takes no underscored names, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args  # so that `namespace(self=…)` works, as in Jinja's own
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _refuse_underscored(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscored(name)
        super().__setitem__(name, value)


def _refuse_underscored(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore, rename it")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it does not escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
