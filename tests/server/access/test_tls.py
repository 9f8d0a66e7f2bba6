"""TLS files that can and can't be used."""

import ssl
from pathlib import Path

import pytest
from loraserve.server.access.tls import TlsConfig, TlsError

from tests.server.certificates import Authority


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority = Authority(tmp_path, "authority")
    authority.issue("server")
    authority.issue("other")
    authority.issue("locked", password=b"password")
    (tmp_path / "text.pem").write_text("no certificate")
    return tmp_path


def test_good_files_make_a_context_of_tls_1_2_or_later(folder: Path) -> None:
    tls = TlsConfig(
        certificate=folder / "server.pem", key=folder / "server.key", client_ca=folder / "authority.pem"
    )
    context = tls.http_context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert tls.grpc_credentials() is not None


@pytest.mark.parametrize(
    ("certificate", "key", "client_ca", "text"),
    [
        ("none.pem", "server.key", None, "none.pem can't be read: No such file"),
        ("server.pem", "none.key", None, "none.key can't be read"),
        ("server.pem", "server.key", "none.pem", "none.pem can't be read"),
        ("text.pem", "server.key", None, "text.pem and key .*server.key can't be used"),
        ("server.pem", "text.pem", None, "can't be used"),
        ("server.pem", "other.key", None, "can't be used.*mismatch"),
        ("server.pem", "locked.key", None, "can't be used.*not encrypted"),
        ("server.pem", "server.key", "text.pem", "client CA .*text.pem is no PEM certificate"),
    ],
)
@pytest.mark.parametrize("make", ["http_context", "grpc_credentials"])
def test_a_bad_file_is_an_error_that_names_it(
    folder: Path, certificate: str, key: str, client_ca: str | None, text: str, make: str
) -> None:
    ca = None if client_ca is None else folder / client_ca
    tls = TlsConfig(certificate=folder / certificate, key=folder / key, client_ca=ca)
    with pytest.raises(TlsError, match=f"(?i){text}"):
        getattr(tls, make)()
