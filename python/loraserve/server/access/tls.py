"""TLS of both servers: a certificate and its key, and optionally the CA of clients' certificates."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from loraserve.errors import LoraserveError


class TlsError(LoraserveError):
    """A certificate, key or CA file can't be used."""


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """PEM files.

    Args:
        certificate: the server's, followed by its chain.
        key: the certificate's private key, not encrypted.
        client_ca: authorities of which every client must show a certificate; None asks for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def http_context(self) -> ssl.SSLContext:
        """TLS 1.2 or later. Raises TlsError, naming the file that can't be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for path in (self.certificate, self.key, self.client_ca):
            _check_readable(path)
        try:
            # An encrypted key would ask for its passphrase on the terminal: an empty one makes it an error.
            context.load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, ValueError) as error:
            raise TlsError(
                f"TLS certificate {self.certificate} and key {self.key} can't be used: {error}; "
                "give a PEM certificate and its key, not encrypted"
            ) from error
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise TlsError(f"client CA {self.client_ca} is no PEM certificate: {error}") from error
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """The same for gRPC. Raises TlsError."""
        self.http_context()  # gRPC itself would only log what is wrong with a file
        pair = (self.key.read_bytes(), self.certificate.read_bytes())
        client_ca = None if self.client_ca is None else self.client_ca.read_bytes()
        return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _check_readable(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.open("rb").close()
    except OSError as error:
        raise TlsError(f"TLS file {path} can't be read: {error.strerror}") from error
