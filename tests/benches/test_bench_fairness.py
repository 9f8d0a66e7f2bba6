"""The bench of fair shares comes to its end and prints all it says."""

import asyncio
import re

import bench_fairness
import pytest


def test_every_part_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_fairness, "NUM_HEAVY", 6)
    monkeypatch.setattr(
        "sys.argv", ["bench_fairness.py", "--seconds", "1", "--turns", "1", "--max-num-seqs", "4"]
    )
    asyncio.run(asyncio.wait_for(bench_fairness.main(), 300))
    shown = capsys.readouterr().out
    assert len(re.findall(r"^light client, .* p50 .* p99 .* of [1-9]", shown, re.MULTILINE)) == 3
    difference, bound = re.findall(r"difference (\d+) at most, bound (\d+)", shown)[0]
    assert 0 < int(difference) <= int(bound)
