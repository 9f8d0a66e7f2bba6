"""What is a location, what is none, and which ones a prefix allows."""

import pytest
from loraserve.errors import InvalidRequestError
from loraserve.remote.location import AllowedLocations, RemoteLocation, parse_remote

SHA = "a" * 64


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("s3://bucket/a/b", RemoteLocation("s3", "bucket", "a/b")),
        ("s3://bucket/a/b/", RemoteLocation("s3", "bucket", "a/b")),
        ("S3://Bucket/a", RemoteLocation("s3", "Bucket", "a")),
        ("gs://bucket", RemoteLocation("gs", "bucket", "")),
        ("az://container/x.tar.gz", RemoteLocation("az", "container", "x.tar.gz")),
        ("https://Host.example:8443/a%20b/c", RemoteLocation("https", "host.example:8443", "a b/c")),
        ("https://h/a.zip?token=x", RemoteLocation("https", "h", "a.zip", "token=x")),
        (f"https://h/a.tgz#sha256={SHA.upper()}", RemoteLocation("https", "h", "a.tgz", "", SHA)),
        ("http://127.0.0.1:80/a", RemoteLocation("http", "127.0.0.1:80", "a")),
        ("oci://Host:5000/a/b", RemoteLocation("oci", "host:5000", "a/b", reference="latest")),
        ("oci://ghcr.io/a/b:v1.2", RemoteLocation("oci", "ghcr.io", "a/b", reference="v1.2")),
        (f"oci://h/a@sha256:{SHA}", RemoteLocation("oci", "h", "a", reference=f"@sha256:{SHA}")),
        (f"oci://h/a:v1@sha256:{SHA}", RemoteLocation("oci", "h", "a", reference=f"@sha256:{SHA}")),
        ("https://[::1]:80/a", RemoteLocation("https", "[::1]:80", "a")),
    ],
)
def test_locations_are_read(text: str, location: RemoteLocation) -> None:
    assert parse_remote(text) == location


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ftp://host/a", "must begin with"),
        ("file:///etc/passwd", "must begin with"),
        ("s3:///a", "no bucket"),
        ("s3://key:secret@bucket/a", "user name or password"),
        ("https://user@host/a", "user name or password"),
        ("s3://bucket/a/../b", "'..'"),
        ("s3://bucket/..", "'..'"),
        ("s3://bucket/a//b", "empty part"),
        ("https://h/a/%2e%2e/b", "'..'"),
        ("https://h/a/..%2fb", "'..'"),
        ("https://h/a%5cb", "backslash"),
        ("https://h/a%00b", "can't be printed"),
        ("https://h/a\nb.zip", "."),
        ("s3://bucket/a?versionId=1", "'?'"),
        ("s3://bucket/%2e%2e/a", "'%'"),
        ("https://h/dir?token=x", "only that of an archive"),
        (f"https://h/dir#sha256={SHA}", "an archive may have"),
        ("https://h/a.zip#sha256=12", "an archive may have"),
        ("https://h:99999999/a", "no bucket or server"),
        ("https://h o/a", "no bucket or server"),
        ("https://[::1/a", "no URL"),
        ("s3://bucket/" + "a" * 5000, "characters"),
        ("oci://h/a:b:c", "comes :TAG or @sha256"),
        ("oci://h/a@sha512:00", "comes :TAG or @sha256"),
        ("oci://h/a:..", "comes :TAG or @sha256"),
        ("oci://h/../a", "'..'"),
        ("oci://h/a?x=1", "has no '\\?'"),
        ("oci://h/%2e%2e/a", "has no '\\?'"),
        ("oci://user:secret@h/a", "user name or password"),
    ],
)
def test_others_are_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why) as caught:
        parse_remote(text)
    assert "secret" not in str(caught.value)
    assert "token=x" not in str(caught.value)


def test_what_gives_access_is_not_shown() -> None:
    location = parse_remote("https://h/a.zip?X-Amz-Signature=abc")
    assert "abc" not in f"{location} {location!r}"
    assert location.url() == "https://h/a.zip?X-Amz-Signature=abc"
    assert str(location) == "https://h/a.zip?…"


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("s3://bucket/adapters", True),
        ("s3://bucket/adapters/sql", True),
        ("s3://bucket/adapters-of-others/sql", False),
        ("s3://bucket/", False),
        ("s3://bucket2/adapters/sql", False),
        ("gs://bucket/adapters/sql", False),
        ("https://host/any/thing", True),
        ("https://host:444/any/thing", False),
        ("http://host/any/thing", False),
        ("oci://ghcr.io/team/adapters:v1", True),
        ("oci://ghcr.io/team/adapters/sql:v1", True),
        ("oci://ghcr.io/team/adapters-of-others:v1", False),
    ],
)
def test_a_prefix_ends_where_a_part_of_the_path_does(text: str, is_allowed: bool) -> None:
    allowed = AllowedLocations.parsed(
        ["s3://bucket/adapters/", "https://host", "oci://ghcr.io/team/adapters"]
    )
    assert allowed.allow(parse_remote(text)) is is_allowed
    assert not AllowedLocations().allow(parse_remote(text))
