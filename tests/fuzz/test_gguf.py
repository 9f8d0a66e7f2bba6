"""Mutated GGUF files: each is served, or refused in one typed line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import gguf_bytes, model_files
from tests.fuzz.bounds import Campaign
from tests.fuzz.mutation import mutate_bytes, mutate_json


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes.padded(gguf_bytes.header(gguf_bytes.describe())) + gguf_bytes.data())
    model_files.serve(path)
    return path


def test_mutated_bytes_of_a_gguf_file_are_served_or_refused(path: Path) -> None:
    whole = path.read_bytes()
    num_header = len(whole) - len(gguf_bytes.data())
    campaign = Campaign("gguf bytes")
    for number, random in campaign.cases():
        path.write_bytes(mutate_bytes(random, whole, num_header))
        campaign.check(number, lambda: model_files.serve(path))
    campaign.finish()


def test_mutated_fields_of_a_gguf_file_are_served_or_refused(path: Path) -> None:
    description, data = gguf_bytes.describe(), gguf_bytes.data()
    campaign = Campaign("gguf fields")
    for number, random in campaign.cases():
        head = gguf_bytes.header(mutate_json(random, description))
        path.write_bytes(gguf_bytes.padded(head) + data)
        campaign.check(number, lambda: model_files.serve(path))
    campaign.finish()
