"""Whose share of the engine a request is served from."""

import pytest
from loraserve.errors import InvalidRequestError
from loraserve.request import AdapterSpec, Flow, GenerateRequest
from loraserve.server.access.fair_shares import FairShares, flow_parts
from loraserve.server.access.keys import AccessControl
from loraserve.settings.entries import ApiKey, FairBy

KEY = ApiKey(name="sales", secret="s", weight=2.0)
WEIGHTS = {"sql": 3.0, "json": 0.5}


@pytest.mark.parametrize(
    ("by", "adapter", "parts", "weight"),
    [
        ("key", None, ("sales", ""), 2.0),
        ("key", "sql", ("sales", ""), 2.0),
        ("adapter", "sql", ("", "sql"), 3.0),
        ("adapter", "other", ("", "other"), 1.0),
        ("adapter", "sql@7", ("", "sql"), 3.0),
        ("adapter", None, ("", ""), 1.0),
        ("key+adapter", "sql", ("sales", "sql"), 6.0),
        ("key+adapter", None, ("sales", ""), 2.0),
        ("key+adapter", {"sql": 0.3, "json": -0.7}, ("sales", "json"), 1.0),
        ("adapter", {"sql": 0.5, "json": 0.5}, ("", "json"), 0.5),
    ],
)
def test_a_request_is_of_its_keys_or_adapters_flow(
    by: FairBy, adapter: AdapterSpec, parts: tuple[str, str], weight: float
) -> None:
    flow = FairShares(by, WEIGHTS).flow(KEY, adapter)
    assert (flow_parts(flow.name), flow.weight) == (parts, weight)


def test_without_shares_all_are_one_flow() -> None:
    assert FairShares("off", WEIGHTS).flow(KEY, "sql") == Flow()


def test_no_two_keys_and_adapters_have_one_flow_whatever_they_are_called() -> None:
    shares = FairShares("key+adapter")
    names = ["a", "a\tb", "\t", "a\t", ""]
    flows = {shares.flow(ApiKey(name=f"k{name}", secret="s"), adapter) for name in names for adapter in "ab"}
    assert len(flows) == 2 * len(names)
    parts = flow_parts(shares.flow(ApiKey(name="a\tb", secret="s"), "c").name)
    assert parts == ("a\tb", "c")


@pytest.mark.parametrize("adapter", ["x" * 10_000, "\ud800", {"\udfff" * 700: 1.0}])
def test_a_name_that_no_adapter_has_is_left_to_who_looks_it_up(adapter: AdapterSpec) -> None:
    FairShares("key+adapter").flow(KEY, adapter)


def test_who_signs_says_the_flow_and_no_caller_chooses_it() -> None:
    access = AccessControl([KEY], shares=FairShares("key"))
    caller = access.authenticate("Bearer s", client_host="192.0.2.1")
    signed = caller.sign(GenerateRequest(prompt="x", flow=Flow("another", 1000.0)))
    assert signed.flow == Flow("sales\t", 2.0)


@pytest.mark.parametrize(
    ("name", "weight", "error"),
    [
        ("x" * 513, 1.0, "at most 512 characters"),
        ("\ud800", 1.0, "not valid Unicode"),
        ("x", 0.0, r"weight of a flow is 0.0, it must be in \[0.001, 1000\]"),
        ("x", float("nan"), "must be a finite number"),
    ],
)
def test_a_flow_that_is_none_is_refused(name: str, weight: float, error: str) -> None:
    with pytest.raises(InvalidRequestError, match=error):
        Flow(name, weight)
