"""Which paths and repositories a running server reads."""

import asyncio
from pathlib import Path

import pytest
from loraserve.adapters.source import AdapterSource
from loraserve.errors import AdapterFormatError, InvalidRequestError, LoraserveError, PermissionDeniedError
from loraserve.server.adapters import sources as module
from loraserve.server.adapters.sources import AdapterSources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/good, and ways out of root: links of folders and of files."""
    adapters = ("good", "linked-file", "linked-shard", "output/checkpoint-1", "linked-below/checkpoint-1")
    for name in (*(f"root/{adapter}" for adapter in adapters), "outside", "rootless"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "root/inside").symlink_to("good")
    (tmp_path / "root/out").symlink_to(tmp_path / "outside")
    (tmp_path / "root/out-chain").symlink_to("out")
    (tmp_path / "root/linked-file/adapter_model.safetensors").symlink_to("/etc/passwd")
    (tmp_path / "root/linked-shard/model-1.safetensors").symlink_to("/etc/passwd")
    (tmp_path / "root/linked-below/checkpoint-1/adapter_model.safetensors").symlink_to("/etc/passwd")
    (tmp_path / "alias").symlink_to("root")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "resolved"),
    [
        ("root/good", "root/good"),
        ("root/../root/good/.", "root/good"),
        ("root/inside", "root/good"),
        ("alias/good", "root/good"),
        ("root/missing", "root/missing"),
        ("root/output", "root/output"),
    ],
)
def test_paths_under_a_root_are_resolved(folder: Path, path: str, resolved: str) -> None:
    sources = AdapterSources([folder / "root"])
    found = asyncio.run(sources.resolve(AdapterSource("local", str(folder / path))))
    assert found == folder / resolved


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("outside", PermissionDeniedError),
        ("root/../outside", PermissionDeniedError),
        ("root/out", PermissionDeniedError),
        ("root/out-chain", PermissionDeniedError),
        ("root/linked-file", PermissionDeniedError),
        ("root/linked-shard", PermissionDeniedError),
        ("root/linked-below", PermissionDeniedError),
        ("rootless", PermissionDeniedError),
        ("", PermissionDeniedError),
        ("/etc", PermissionDeniedError),
        ("/proc/self/root/etc", PermissionDeniedError),
        ("~", PermissionDeniedError),
        ("~nobody-of-this-name", PermissionDeniedError),
        ("root/good\0", InvalidRequestError),
    ],
)
def test_other_paths_are_refused(folder: Path, path: str, error: type[LoraserveError]) -> None:
    sources = AdapterSources([folder / "root"])
    text = path if path.startswith(("/", "~")) or not path else str(folder / path)
    with pytest.raises(error):
        asyncio.run(sources.resolve(AdapterSource("local", text)))


@pytest.mark.parametrize(
    ("text", "revision", "source"),
    [
        ("good", None, AdapterSource("local", "good")),
        ("root/good", None, AdapterSource("hub", "root/good")),
        ("other/deeper", None, AdapterSource("local", "other/deeper")),
        ("missing", None, AdapterSource("hub", "missing")),
        ("good", "main", AdapterSource("hub", "good", "main")),
        ("hf://good", None, AdapterSource("hub", "good")),
        ("./good", None, AdapterSource("local", "./good")),
        ("./missing", None, AdapterSource("local", "./missing")),
        ("../outside", None, AdapterSource("local", "../outside")),
        ("a/b/c", None, AdapterSource("local", "a/b/c")),
    ],
)
def test_a_name_is_a_directory_under_a_root_or_else_a_repository(
    folder: Path, text: str, revision: str | None, source: AdapterSource
) -> None:
    (folder / "second/other/deeper").mkdir(parents=True)
    sources = AdapterSources([folder / "root", folder / "second"])
    assert sources.find(text, revision) == source


@pytest.mark.parametrize("text", ["good", "./good", "inside"])
def test_a_relative_path_is_taken_from_the_roots(folder: Path, text: str) -> None:
    sources = AdapterSources([folder / "root"])
    assert asyncio.run(sources.resolve(sources.find(text))) == folder / "root/good"


@pytest.mark.parametrize("text", ["out", "./../outside", "../outside", ".", "..", "./out-chain"])
def test_a_relative_path_does_not_leave_its_root(folder: Path, text: str) -> None:
    sources = AdapterSources([folder / "root"])
    with pytest.raises(PermissionDeniedError, match="not under an adapter root"):
        asyncio.run(sources.resolve(sources.find(text)))


def test_a_name_that_is_nowhere_says_where_it_was_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo_id: str, *_: object) -> Path:
        raise AdapterFormatError(f"adapter {repo_id!r} is not on the Hub")

    monkeypatch.setattr(module, "download_adapter", download)
    local = f"no directory 'a-two' lies under an adapter root \\({folder / 'root'}\\); "
    sources = AdapterSources([folder / "root"], hub_repos=("*",))
    with pytest.raises(AdapterFormatError, match=f"^{local}adapter 'a-two' is not on the Hub"):
        asyncio.run(sources.resolve(sources.find("a-two")))
    sources = AdapterSources([folder / "root"], hub_repos=())
    with pytest.raises(PermissionDeniedError, match=f"^{local}Hub repository 'a-two' is not allowed"):
        asyncio.run(sources.resolve(sources.find("a-two")))
    with pytest.raises(PermissionDeniedError, match="^Hub repository 'a-two' is not allowed"):
        asyncio.run(sources.resolve(sources.find("hf://a-two")))
    with pytest.raises(PermissionDeniedError, match="under an adapter root: there is none"):
        asyncio.run(AdapterSources(hub_repos=()).resolve(AdapterSources().find("a-two")))


def test_without_roots_no_path_is_read(folder: Path) -> None:
    with pytest.raises(PermissionDeniedError, match="--adapter-root"):
        AdapterSources().check_path(str(folder / "root/good"))


@pytest.mark.parametrize(
    ("patterns", "repo", "is_allowed"),
    [
        (("*",), "org/name", True),
        (("org/*",), "org/name", True),
        (("org/*", "name"), "name", True),
        (("org/*",), "organ/name", False),
        ((), "org/name", False),
    ],
)
def test_repositories_are_fetched_where_a_pattern_allows_them(
    monkeypatch: pytest.MonkeyPatch, patterns: tuple[str, ...], repo: str, is_allowed: bool
) -> None:
    fetched = []

    def download(repo_id: str, revision: str | None, token: str | None, on_progress: object) -> Path:
        fetched.append((repo_id, revision, token))
        return Path("/cache") / repo_id

    monkeypatch.setattr(module, "download_adapter", download)
    sources = AdapterSources(hub_repos=patterns)
    source = AdapterSource("hub", repo, "main")
    if is_allowed:
        assert asyncio.run(sources.resolve(source, "token")) == Path("/cache") / repo
        assert fetched == [(repo, "main", "token")]
        return
    with pytest.raises(PermissionDeniedError, match="--hub-repo"):
        asyncio.run(sources.resolve(source))
    assert fetched == []
