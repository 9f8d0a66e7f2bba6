"""The Grafana dashboard asks only for what /metrics has."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from loraserve.server.observe.metrics import Metrics
from loraserve.server.observe.prometheus import render
from prometheus_client.parser import text_string_to_metric_families

from tests.server.control_server import ControlEngine

DASHBOARD = Path(__file__).parents[3] / "deploy/grafana-dashboard.json"
PANELS: list[dict[str, Any]] = [
    panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"
]
METRIC = re.compile(r"\b(?:loraserve|tgi|process)_\w+")
LABELS = re.compile(r"\bby \(([^)]+)\)|(\w+)=~?\"")


@pytest.fixture(scope="module")
def served() -> dict[str, set[str]]:
    """Name of each sample → its labels, after one request."""
    metrics, engine = Metrics(), ControlEngine("sql")
    request = metrics.request_started("/generate", "sql")
    request.token()
    request.finished("success")
    text = render(metrics, engine.info(), engine.stats()).decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    labels: dict[str, set[str]] = {}
    for sample in samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_served_metrics_and_labels(
    panel: dict[str, Any], served: dict[str, set[str]]
) -> None:
    for target in panel["targets"]:
        names = METRIC.findall(target["expr"])
        assert names
        assert set(names) <= set(served)
        known = {"instance", *(label for name in names for label in served[name])}
        asked = {
            label for pair in LABELS.findall(target["expr"]) for part in pair for label in part.split(", ")
        }
        assert asked - {""} <= known


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    cells = [
        (x, y)
        for panel in PANELS
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
