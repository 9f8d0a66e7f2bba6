"""How adapter sources are written."""

from pathlib import Path

import pytest
from loraserve.adapters.source import AdapterSource, parse_lora_adapters, parse_source
from loraserve.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("org/name", AdapterSource("hub", "org/name")),
        ("name", AdapterSource("hub", "name")),
        ("hf://there/is-a-folder", AdapterSource("hub", "there/is-a-folder")),
        ("there", AdapterSource("local", "there")),
        ("there/is-a-folder", AdapterSource("local", "there/is-a-folder")),
        ("./missing", AdapterSource("local", "./missing")),
        ("../missing", AdapterSource("local", "../missing")),
        ("/missing", AdapterSource("local", "/missing")),
        ("~/missing", AdapterSource("local", "~/missing")),
        ("a/b/c", AdapterSource("local", "a/b/c")),
        ("with space", AdapterSource("local", "with space")),
    ],
)
def test_what_is_no_path_here_and_looks_like_a_hub_id_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, source: AdapterSource
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there/is-a-folder").mkdir(parents=True)
    assert parse_source(text) == source


@pytest.mark.parametrize("text", ["~no-such-user/x", "x" * 300 + "/y" * 3, "~\0/x", "/" + "x" * 300])
def test_a_path_that_can_be_none_is_one_that_is_not_there(text: str) -> None:
    assert parse_source(text) == AdapterSource("local", text)


def test_a_path_has_no_revision() -> None:
    with pytest.raises(InvalidRequestError, match="revision 'main'"):
        parse_source("/adapters/sql", "main")


HUB = {"id": AdapterSource("hub", "id"), "name": AdapterSource("hub", "org/x")}


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("", {}),
        (" , ,", {}),
        ("id", {"id": HUB["id"]}),
        ("org/x", {"org-x": HUB["name"]}),
        ("name=org/x", {"name": HUB["name"]}),
        ("name=/data/x", {"name": AdapterSource("local", "/data/x")}),
        ("id@rev", {"id": AdapterSource("hub", "id", "rev")}),
        ("name=org/x@refs/pr/1", {"name": AdapterSource("hub", "org/x", "refs/pr/1")}),
        (" id , name = org/x ", HUB),
    ],
)
def test_tgis_list_of_adapters(text: str, sources: dict[str, AdapterSource]) -> None:
    assert parse_lora_adapters(text) == sources


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a=b=c", "'a=b=c' is not id"),
        ("a@b@c", "'a@b@c' is not id"),
        ("a@b=c", "'a@b=c' is not id"),
        ("=x", "'=x' is not id"),
        ("a=", "'a=' is not id"),
        ("a@", "'a@' is not id"),
        ("a=/x@main", "revision 'main'"),
        ("a=x,a=y", "name 'a' twice"),
        ("a b=x", "'a b' is not allowed"),
    ],
)
def test_a_malformed_list_is_refused(text: str, error: str) -> None:
    with pytest.raises(InvalidRequestError, match=error):
        parse_lora_adapters(text)
