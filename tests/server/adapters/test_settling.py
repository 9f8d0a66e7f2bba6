"""What can't be read may be on its way, for a while."""

from __future__ import annotations

from loraserve.server.adapters.settling import SETTLE_S, Settling


def test_it_may_pass_for_a_while_and_again_after_it_was_read() -> None:
    now = 100.0
    settling = Settling(lambda: now)
    assert not settling.note([])
    assert settling.note(["a"])
    now += SETTLE_S - 1.0
    assert settling.note(["a", "b"])
    now += 1.0
    assert not settling.note(["a"])
    assert settling.note(["a", "b"])
    settling.forget("a")
    assert settling.note(["a"])
