"""The dashboard in a browser, against the real routes over a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from loraserve import AsyncEngine, EngineConfig
from loraserve.server.access.keys import AccessControl
from loraserve.server.adapters.sources import AdapterSources
from loraserve.server.http.app import create_app
from loraserve.server.http.state import HttpState
from loraserve.server.observe.metrics import Metrics

from tests.server.http.conftest import CHAT, NUM_TOKENS, Expected
from tests.server.http.dashboard_visit import Visit, chromium
from tests.server.http.fake_dashboard_server import DashboardThread


class EngineApp:
    """The whole app, as `loraserve serve` has it, with `root` the only folder adapters may be loaded from."""

    def __init__(self, config: EngineConfig, root: Path) -> None:
        self._config, self._root = config, root
        self.engine: Any = None

    def make(self) -> FastAPI:
        self.engine = AsyncEngine(self._config)
        return create_app(
            HttpState(
                engine=self.engine,
                served_names=("smollm2",),
                access=AccessControl.open(),
                metrics=Metrics(),
                sources=AdapterSources([self._root]),
            )
        )

    async def stop(self) -> None:
        await self.engine.shutdown(0.0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def engine_visit(browser: Any, engine_config: EngineConfig, http_adapters: dict[str, str]) -> Iterator[Visit]:
    app = EngineApp(engine_config, Path(http_adapters["small"]).parent)
    with DashboardThread(app.make, app.stop) as server:
        context = browser.new_context()
        visit = Visit(context, server.url)
        visit.open()
        yield visit
        context.close()
    assert visit.console_errors == []
    assert visit.foreign_requests == []


def test_operator_works_with_adapters_and_prompts(
    engine_visit: Visit, expected: Expected, http_adapters: dict[str, str]
) -> None:
    visit, page = engine_visit, engine_visit.page
    visit.has_text("#connection", "live")
    visit.has_text("#figure-resident", "0 of 3")

    page.locator("#picks label[data-model=partial]").click()
    page.fill("#prompt", CHAT[0]["content"])
    page.fill("#max-tokens", str(NUM_TOKENS))
    page.fill("#temperature", "0")
    page.click("#run")
    visit.has_text("#run-status", "4 answers finished.")
    for model, adapter in (("smollm2", None), ("small", "small"), ("large", "large"), ("partial", "partial")):
        answer = page.locator(f".answer[data-model={model}] .text").text_content()
        assert answer == expected.chat[adapter]
    visit.has_text("#figure-resident", "3 of 3")
    page.locator("[data-adapter=large] .sparkline .dots[d^=M]").wait_for(state="attached")

    page.click("#load-open")
    page.fill("#load-name", "again")
    page.fill("#load-source", "/etc")
    page.click("#load-submit")
    visit.has_text("#load-error", "--adapter-root")
    page.fill("#load-source", http_adapters["large"])
    page.check("#load-pin")
    page.click("#load-submit")
    visit.has_text("#load-receipt", "q_proj")
    page.click("#load-close")
    visit.has_text("[data-adapter=again]", "Pinned")
    visit.has_text("[data-adapter=again]", "in the pool")

    page.get_by_role("button", name="Versions of again").click()
    visit.has_text("[data-generation='1']", "Generation 1, current")
    assert page.get_by_label("Share of generation 1").input_value() == "100"
    page.click("#versions-close")

    page.get_by_role("button", name="Pin again").click()
    page.locator("[data-adapter=again] [aria-pressed=false]").first.wait_for()
    page.get_by_role("button", name="Unload again").click()
    page.click("#unload-confirm")
    page.locator("[data-adapter=again]").wait_for(state="detached")
