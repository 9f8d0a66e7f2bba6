"""Lines of batches for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def line(custom_id: object, prompt: str = "a b", **body: Any) -> bytes:
    request = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "base", "prompt": prompt, **body},
    }
    return json.dumps(request).encode()


def results_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(one) for one in path.read_bytes().splitlines()]
