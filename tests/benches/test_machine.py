"""Machines are called by what they are, as far as /proc/cpuinfo tells."""

import machine
import pytest

ZEN_5 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC

processor\t: 1
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: another
"""
INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
"""


@pytest.mark.parametrize(
    ("cpuinfo", "name"), [(ZEN_5, "AMD EPYC (Zen 5)"), (INTEL, "Intel(R) Xeon(R) Processor")]
)
def test_a_processor_of_amd_is_named_with_its_generation(cpuinfo: str, name: str) -> None:
    assert machine.name_of(cpuinfo) == name


@pytest.mark.parametrize(
    ("family", "model", "zen"),
    [
        (0x17, 0x01, 1),  # Naples
        (0x17, 0x31, 2),  # Rome
        (0x19, 0x01, 3),  # Milan
        (0x19, 0x11, 4),  # Genoa
        (0x19, 0x21, 3),  # Vermeer
        (0x19, 0x61, 4),  # Raphael
        (0x19, 0xA0, 4),  # Bergamo
        (0x1A, 0x02, 5),  # Turin
        (0x15, 0x02, None),
    ],
)
def test_generations_follow_family_and_model(family: int, model: int, zen: int | None) -> None:
    assert machine.amd_zen(family, model) == zen


def test_a_machine_in_a_file_name_has_no_signs_but_hyphens() -> None:
    assert machine.slug_of("AMD EPYC (Zen 5)", 2) == "amd-epyc-zen-5-2-cores"
