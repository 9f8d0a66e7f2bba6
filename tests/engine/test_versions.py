"""Another engine goes on with the generations of the first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from loraserve.engine.versions import AdapterVersions
from loraserve.errors import AdapterNotFoundError


def publish(versions: AdapterVersions, name: str, content: str, share: float | None = None) -> int:
    number = versions.next_number(name, content)
    adapter: Any = SimpleNamespace(
        name=name, generation=number, receipt=SimpleNamespace(hash=content), path=f"/{content}"
    )
    versions.publish(name, adapter, share)
    return number


def restored(versions: AdapterVersions, name: str, max_kept: int) -> AdapterVersions:
    """As a replica that was started again does it."""
    history = versions.history(name)
    contents = {one.number: one.hash for one in history.history}
    other = AdapterVersions(max_kept)
    other.keep_all(name)
    for number in history.kept:
        other.continue_at(name, number)
        assert publish(other, name, contents[number]) == number
    other.restore(name, history)
    return other


@pytest.mark.parametrize("max_kept", [0, 1, 8])
def test_numbers_shares_and_ways_back_go_on(max_kept: int) -> None:
    versions = AdapterVersions(max_kept)
    for content in ("a", "b", "a", "c"):
        publish(versions, "sql", content)
    publish(versions, "sql", "d", 0.25)
    other = restored(versions, "sql", max_kept)
    assert other.history("sql") == versions.history("sql")
    assert [one.share for one in other.infos("sql")] == [one.share for one in versions.infos("sql")]
    for each in (versions, other):
        assert publish(each, "sql", "e") == 6
        assert publish(each, "sql", "f", 0.5) == 7
        assert each.back("sql", None) == 6
    assert other.history("sql").kept == versions.history("sql").kept


def test_a_name_that_is_gone_goes_on_where_it_was() -> None:
    versions = AdapterVersions(0)
    versions.continue_at("sql", 8)
    assert publish(versions, "sql", "a") == 8
    assert publish(versions, "sql", "b") == 9


def test_a_history_whose_generations_are_not_there_is_refused() -> None:
    versions = AdapterVersions(4)
    publish(versions, "sql", "a")
    publish(versions, "sql", "b")
    other = AdapterVersions(4)
    publish(other, "sql", "a")
    with pytest.raises(AdapterNotFoundError, match="generation 2"):
        other.restore("sql", versions.history("sql"))
