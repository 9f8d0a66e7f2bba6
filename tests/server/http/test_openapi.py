"""schemathesis against the served OpenAPI document: requests of all kinds, none answered 5xx, none hanging.

LORASERVE_SCHEMATHESIS_CASES sets how many are made in all, at least; the default fits a test run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from loraserve import AsyncEngine, EngineConfig
from schemathesis import GenerationMode
from schemathesis.checks import (
    FailureGroup,
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.http.http_thread import HttpThread

NUM_CASES = int(os.environ.get("LORASERVE_SCHEMATHESIS_CASES", "200"))
TIMEOUT_S = 20.0
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def server(
    tiny_model: tuple[Path, Any], tiny_adapters: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpThread]:
    adapters = {name: tiny_adapters[name] for name in ("a0", "a1")}
    config = EngineConfig(model=str(tiny_model[0]), adapters=adapters, dtype="float32", memory="32MiB")
    batches = tmp_path_factory.mktemp("batches")
    with HttpThread(lambda: AsyncEngine(config), served_names=("tiny",), batch_dir=batches) as server:
        yield server


def test_generated_requests_are_answered_as_the_document_says(server: HttpThread) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 20
    num_each = -(-NUM_CASES // (len(operations) * len(MODES)))
    failures, num_made = [], 0
    for operation in operations:
        for mode in MODES:
            made = _run(operation, mode, num_each, failures)
            num_made += made
    assert not failures, "\n\n".join(failures)
    assert num_made >= NUM_CASES * 0.8  # an operation without parameters has few distinct requests
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.engine.info().num_running == 0


def _run(operation: Any, mode: GenerationMode, num_cases: int, failures: list[str]) -> int:
    """The number of requests made; at most one failure of each operation is noted."""
    num_made = 0

    @seed(0)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal num_made
        num_made += 1
        response = case.call(timeout=TIMEOUT_S)
        case.validate_response(response, checks=CHECKS)

    try:
        ask()
    except Unsatisfiable:
        pass  # where nothing is asked, nothing can be asked wrongly
    except (Exception, FailureGroup) as error:
        texts = map(str, error.exceptions) if isinstance(error, FailureGroup) else [repr(error)]
        failures.append("\n".join([f"{operation.label} ({mode.value}):", *texts]))
    return num_made
