"""TLS and mutual TLS; certificates may be replaced while the server runs."""

import threading
import time
from pathlib import Path
from typing import Any

import grpc

from mtlora.files import signature
from server.telemetry.logs import get_logger

logger = get_logger("tls")


class TLSError(ValueError):
    """An unusable certificate file; the message names the file and what is wrong with it."""


class Certificates:
    """The files of a TLS server. gRPC asks for them at every handshake; changed files serve the next one.

    With `client_ca`, clients must show a certificate signed by it (mutual TLS). If changed files are bad, the old ones
    stay in use. Raises TLSError if the first read fails.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._paths = (certificate, key) + ((client_ca,) if client_ca else ())
        self._mutual = client_ca is not None
        self._lock = threading.Lock()
        self._seen = self._signatures()
        self._not_after = 0.0
        self._first = self._read()
        # The newest configuration, until gRPC asks for it.
        self._fresh: Any = None

    def credentials(self) -> Any:
        """Server credentials for `add_secure_port`, of grpc and of grpc.aio alike."""
        return grpc.dynamic_ssl_server_credentials(self._first, self._fetch, require_client_authentication=self._mutual)

    @property
    def path(self) -> Path:
        return self._paths[0]

    def not_after(self) -> float:
        """Expiry of the certificate in use, in seconds since 1970. From any thread."""
        with self._lock:
            self._refresh()
            return self._not_after

    def _fetch(self) -> Any:
        """The new configuration if the files have changed, else None: keep the old. Runs in gRPC's threads."""
        with self._lock:
            self._refresh()
            fresh, self._fresh = self._fresh, None
            return fresh

    def _refresh(self) -> None:
        """Read the files again if they have changed."""
        signatures = self._signatures()
        if signatures == self._seen:
            return
        self._seen = signatures
        try:
            self._fresh = self._read()
        except TLSError as error:
            logger.error("certificates refused; the old ones stay in use", extra={"fields": {"reason": str(error)}})
        else:
            logger.info("certificates reloaded", extra={"fields": {"certificate": str(self.path)}})

    def _read(self) -> Any:
        try:
            contents = [path.read_bytes() for path in self._paths]
        except OSError as error:
            raise TLSError(str(error)) from None
        self._not_after = _check(self._paths, contents)
        return grpc.ssl_server_certificate_configuration(
            [(contents[1], contents[0])], root_certificates=contents[2] if self._mutual else None
        )

    def _signatures(self) -> tuple[Any, ...]:
        return tuple(signature(path) for path in self._paths)


def _check(paths: tuple[Path, ...], contents: list[bytes]) -> float:
    """The certificate's expiry. Raises TLSError for files with which gRPC would fail every handshake."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        leaf = x509.load_pem_x509_certificates(contents[0])[0]
    except ValueError as error:
        raise TLSError(f"{paths[0]}: no PEM certificate: {error}") from None
    try:
        key: Any = serialization.load_pem_private_key(contents[1], password=None)
    except (ValueError, TypeError) as error:
        raise TLSError(f"{paths[1]}: no PEM private key without a password: {error}") from None
    if key.public_key().public_bytes(encoding, form) != leaf.public_key().public_bytes(encoding, form):
        raise TLSError(f"{paths[1]}: not the key of the certificate {paths[0]}")
    if leaf.not_valid_after_utc.timestamp() < time.time():
        raise TLSError(f"{paths[0]}: expired on {leaf.not_valid_after_utc:%Y-%m-%d}")
    if len(contents) > 2:
        try:
            x509.load_pem_x509_certificates(contents[2])
        except ValueError as error:
            raise TLSError(f"{paths[2]}: no PEM certificate: {error}") from None
    return leaf.not_valid_after_utc.timestamp()
