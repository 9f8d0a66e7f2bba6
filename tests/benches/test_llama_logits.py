"""What llama.cpp's server says of tokens becomes one row of the vocabulary."""

import llama_logits
import pytest
import torch


def test_entries_in_any_order_become_a_row_and_vanished_ones_the_floor() -> None:
    entries = [{"id": 2, "logprob": -1.0}, {"id": 0, "logprob": -3.4e38}, {"id": 1, "logprob": -0.5}]
    row = llama_logits.from_entries(entries)
    assert torch.equal(row, torch.tensor([llama_logits.FLOOR, -0.5, -1.0]))


@pytest.mark.parametrize("ids", [(0, 2), (0, 0)])
def test_a_token_without_an_entry_is_refused(ids: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="2 tokens aren't all"):
        llama_logits.from_entries([{"id": token, "logprob": -1.0} for token in ids])
