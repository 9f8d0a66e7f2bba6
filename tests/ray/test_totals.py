"""What replicas tell is added up."""

from __future__ import annotations

from dataclasses import asdict, fields

from loraserve.engine.stats import AdapterUsage
from loraserve.ray.totals import total_usage


def test_every_count_of_an_adapters_use_is_added_up() -> None:
    values = {field.name: place + 0.25 for place, field in enumerate(fields(AdapterUsage))}
    usage = AdapterUsage(**values)  # type: ignore[arg-type]
    assert asdict(total_usage([usage, usage])) == {name: 2 * value for name, value in values.items()}
