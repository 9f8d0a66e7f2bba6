"""`FairShares`: whose share of the engine a request is served from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraserve.engine.prepared import resolve_adapters
from loraserve.request import ONE_FLOW, AdapterSpec, Flow
from loraserve.settings.entries import ApiKey, FairBy
from loraserve.settings.fields import WEIGHTS
from loraserve.validation.values import check_float

_SEPARATOR = "\t"  # in no name of an adapter, so that a flow's parts are told apart whatever keys are called


@dataclass(frozen=True)
class FairShares:
    """What flows are told apart by, and the weights of adapters at start, 1 where none is said.

    A request of several adapters is served from the share of the one that weighs most in it: a sum of its own
    would be a share of its own.
    """

    by: FairBy = "off"
    adapter_weights: Mapping[str, float] = field(default_factory=dict)
    _given: dict[str, float] = field(default_factory=dict, init=False)  # since the start

    def flow(self, key: ApiKey, adapter: AdapterSpec) -> Flow:
        """Of a request; the weights of its key and adapter are multiplied where both count.

        Raises InvalidRequestError: `adapter` names none.
        """
        if self.by == "off":
            return ONE_FLOW
        adapters = resolve_adapters(adapter)
        name, weight = "", 1.0
        if "key" in self.by:
            name, weight = _bounded(key.name), key.weight
        if "adapter" in self.by:
            main = min(adapters, key=lambda one: (-abs(one[1]), one[0]))[0] if adapters else ""
            main = main.partition("@")[0]  # all its generations have one share
            name += _SEPARATOR + _bounded(main)
            weight *= self.weight_of(main)
        else:
            name += _SEPARATOR
        return Flow(name, weight)

    def weight_of(self, name: str) -> float:
        """Of an adapter, whether or not it is told apart."""
        given = self._given.get(name)
        return self.adapter_weights.get(name, 1.0) if given is None else given

    def give(self, name: str, weight: float) -> None:
        """An adapter has this weight from its next request on, which `check_weight` has passed."""
        self._given[name] = weight

    def forget(self, name: str) -> None:
        """An adapter is unloaded; the next of its name has the weight of the start."""
        self._given.pop(name, None)


def check_weight(weight: float) -> None:
    """Raises InvalidRequestError: it is out of range."""
    check_float("weight", weight, *WEIGHTS)


def flow_parts(name: str) -> tuple[str, str]:
    """The key and the adapter of a flow; "" where it isn't told apart by that, or is the base model's."""
    key, _, adapter = name.rpartition(_SEPARATOR)
    return key, adapter


def _bounded(name: str) -> str:
    """What a flow may be called; names that are none of an adapter are refused where they are looked up."""
    return name.encode(errors="replace").decode()[:250]
