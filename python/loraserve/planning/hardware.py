"""`Hardware`: what a replica runs on, and what is known of its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraserve.backends.machine_memory import host_memory
from loraserve.config import parse_memory
from loraserve.errors import InvalidRequestError, ModelError
from loraserve.loader.default import cache_folder
from loraserve.planning.costs import Costs, costs_of, read_costs
from loraserve.planning.machine import machine_name
from loraserve.validation.files import expanded
from loraserve.validation.json_file import read_json
from loraserve.validation.values import check_choice, check_float

MEASURED = Path(__file__).parent / "measured"
THIS = "this"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One replica's machine.

    Args:
        name: for people.
        device: "cpu" or "cuda".
        memory_nbytes: of the device.
        free_nbytes: of that, free for a server.
        read_bytes_per_s, flop_per_s: a large copy's, and a large bfloat16 product's.
        basis: what these rest on.
        costs: of some model, on this or on like hardware.
        like: whose costs they are, where that is not this hardware.
    """

    name: str
    device: str
    memory_nbytes: int
    free_nbytes: int
    read_bytes_per_s: float
    flop_per_s: float
    basis: str
    costs: Costs
    like: Hardware | None = field(default=None)


def _gib(gib: float) -> int:
    return int(gib * 2**30)


@dataclass(frozen=True)
class _Known:
    device: str
    gib: float
    read_bytes_per_s: float
    flop_per_s: float
    basis: str
    costs: str
    like: str | None = None

    @property
    def path(self) -> Path:
        """Of the costs."""
        return MEASURED / f"{self.costs}.json"


PUBLISHED = (
    "published bandwidth and dense bfloat16 rate, at the shares of them that an H100 was measured to reach"
)
KNOWN = {
    "h100": _Known("cuda", 79.2, 3.007e12, 782e12, "measured on 2026-11-26 (docs/gpu/h100)", "h100"),
    "h200": _Known("cuda", 139.8, 4.2e12, 737e12, "measured on 2026-11-26 (docs/gpu)", "h200"),
    "a100-80gb": _Known("cuda", 79.2, 2.039e12, 312e12, PUBLISHED, "h100", "h100"),
    "l40s": _Known("cuda", 44.5, 0.864e12, 362e12, PUBLISHED, "h100", "h100"),
    "l4": _Known("cuda", 22.0, 0.300e12, 121e12, PUBLISHED, "h100", "h100"),
    "cpu": _Known("cpu", 23.5, 40e9, 2.0e12, "AMD EPYC (Zen 5), two cores", "cpu"),
}


def names() -> list[str]:
    """What `hardware` knows without a file."""
    return [*(name for name, known in KNOWN.items() if known.path.exists()), THIS]


def own_costs_path() -> Path:
    """Where the costs measured on this machine are kept."""
    return cache_folder() / "costs.json"


def hardware(name: str, costs: Path | None = None) -> Hardware:
    """Known, this machine, or what a JSON file says: {"name", "device", "memory", "read_gb_per_s",
    "tflop_per_s"} and either "like", a known GPU whose shares of these it reaches, or "costs".

    Args:
        costs: a file of costs to take in place of those that are known.

    Raises:
        InvalidRequestError: it is not known, or nothing is known of its speed.
    """
    if name == THIS:
        found = _this(costs)
    elif name in names():
        found = _known(name)
    elif name.endswith(".json"):
        found = _of_file(expanded(name))
    else:
        raise InvalidRequestError(
            f"hardware {name!r:.100} is not known, give {', '.join(names())} or a .json file"
        )
    if costs is not None and name != THIS:
        read = read_costs(costs)
        found = Hardware(**{**vars(found), "costs": read, "like": None})
    return found


def _known(name: str) -> Hardware:
    known = KNOWN[name]
    return Hardware(
        name=name,
        device=known.device,
        memory_nbytes=_gib(known.gib),
        free_nbytes=_gib(known.gib - 0.5 if known.device == "cuda" else known.gib * 0.9),
        read_bytes_per_s=known.read_bytes_per_s,
        flop_per_s=known.flop_per_s,
        basis=known.basis,
        costs=read_costs(known.path),
        like=None if known.like is None else _known(known.like),
    )


def _this(costs: Path | None) -> Hardware:
    path = own_costs_path() if costs is None else costs
    if not path.exists():
        raise InvalidRequestError(
            f"nothing was measured on this machine, {path} is not there: run `loraserve simulate MODEL "
            "--calibrate` first, which takes a minute"
        )
    read, memory = read_costs(path), host_memory()
    return Hardware(
        name=machine_name(),
        device="cpu",
        memory_nbytes=memory.total,
        free_nbytes=memory.free,
        read_bytes_per_s=KNOWN["cpu"].read_bytes_per_s,
        flop_per_s=KNOWN["cpu"].flop_per_s,
        basis=read.basis,
        costs=read,
    )


def _of_file(path: Path) -> Hardware:
    try:
        values = read_json(path)
    except ModelError as error:
        raise InvalidRequestError(f"hardware can't be read: {error}") from None
    expected = {"name", "device", "memory", "read_gb_per_s", "tflop_per_s", "like", "costs"}
    if unknown := values.keys() - expected:
        raise InvalidRequestError(f"{path}: unknown fields {', '.join(sorted(unknown))}")
    check_choice(f"{path}: device", values.get("device"), ("cpu", "cuda"))
    for key in ("read_gb_per_s", "tflop_per_s"):
        check_float(f"{path}: {key}", values.get(key), 0.0, 1e9, open_low=True)
    memory = parse_memory(values.get("memory", 0), f"{path}: memory")
    if memory is None:
        raise InvalidRequestError(f"{path}: memory is auto, give the size of the device's")
    costs, like = _speed(path, values)
    return Hardware(
        name=str(values.get("name", path.stem)),
        device=values["device"],
        memory_nbytes=memory,
        free_nbytes=int(memory * 0.95),
        read_bytes_per_s=values["read_gb_per_s"] * 1e9,
        flop_per_s=values["tflop_per_s"] * 1e12,
        basis=f"{path.name}",
        costs=costs,
        like=like,
    )


def _speed(path: Path, values: Mapping[str, Any]) -> tuple[Costs, Hardware | None]:
    if isinstance(values.get("costs"), dict):
        return costs_of(values["costs"], f"{path}: costs"), None
    check_choice(f"{path}: like", values.get("like"), tuple(KNOWN))
    like = _known(values["like"])
    return like.costs, like
