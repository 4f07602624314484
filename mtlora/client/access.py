"""A client's credentials: an API key, and TLS."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc


@dataclass(frozen=True)
class Access:
    """Credentials of a client; certificates and keys are paths of PEM files.

    api_key: an API key, or a token of an issuer that the server knows. ca: the authorities that sign the server's
    certificate; None means no TLS. certificate, key: the client's own, if the server requires them. server_name: the
    name in the server's certificate, if it differs from the host in the address.
    """

    api_key: str | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata to send with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def channel(self, kind: Any, address: str, options: list[tuple[str, Any]]) -> Any:
        """Open a channel with `kind`, the module grpc or grpc.aio. Raises OSError for a file that cannot be read."""
        if self.ca is None:
            return kind.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(
            self.ca.read_bytes(),
            self.key.read_bytes() if self.key else None,
            self.certificate.read_bytes() if self.certificate else None,
        )
        if self.server_name:
            options = [*options, ("grpc.ssl_target_name_override", self.server_name)]
        return kind.secure_channel(address, credentials, options=options)


OPEN = Access()
