"""Finds a call's tenant by an API key or token in its metadata, or by its connection's certificate."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc

from server.errors import RequestFailedError, unauthenticated
from server.tenants.config import OPEN_TENANT, Tenant
from server.tenants.directory import Directory, Tenants
from server.tenants.keys import KEY
from server.tenants.proxies import named_tenant
from server.tenants.tokens import Tokens

_SCHEME = "bearer "
# Number of cached certificates.
_REMEMBERED = 65_536


class Authenticator:
    """Maps a call to its tenant: the caller's own, or the one that a trusted proxy names.

    `tokens.run` keeps the keys of tokens' issuers up to date.
    """

    def __init__(self, directory: Directory, on_jwks_failure: Callable[[str], None] = lambda _: None) -> None:
        self._directory = directory
        self.tokens = Tokens(directory, on_jwks_failure)
        self._certificates: OrderedDict[bytes, Certificate] = OrderedDict()

    async def tenant(
        self, metadata: Iterable[tuple[str, str | bytes]], auth_context: Callable[[], Mapping[str, Sequence[bytes]]]
    ) -> Tenant:
        """The caller's tenant. Raises UNAUTHENTICATED without saying which part of a key is wrong.

        `auth_context` is called only without key and token, because it copies the connection's certificates.
        """
        tenants = self._directory.current
        if tenants.open:
            return next(iter(tenants.by_id.values()))
        caller = await self._caller(tenants, metadata, auth_context)
        return named_tenant(caller, tenants, metadata) if caller.speaks_for else caller

    async def _caller(
        self,
        tenants: Tenants,
        metadata: Iterable[tuple[str, str | bytes]],
        auth_context: Callable[[], Mapping[str, Sequence[bytes]]],
    ) -> Tenant:
        if (bearer := _bearer(metadata)) is not None:
            # A token contains two dots, a key none.
            return await self.tokens.tenant(bearer) if "." in bearer and tenants.issuers else self._by_key(bearer)
        if pem := auth_context().get("x509_pem_cert"):
            return self._by_certificate(pem[0])
        raise unauthenticated("no API key or token in metadata `authorization: Bearer KEY`, and no client certificate")

    def _by_key(self, key: str) -> Tenant:
        parsed = KEY.fullmatch(key)
        found = self._directory.current.by_key_id.get(parsed["id"]) if parsed else None
        if found is None or not found[1].matches(key):
            raise unauthenticated("the API key is not one of this server's")
        if found[1].expired:
            raise unauthenticated("the API key has expired")
        return found[0]

    def _by_certificate(self, pem: bytes) -> Tenant:
        certificate = self._certificates.get(pem)
        if certificate is None:
            certificate = self._certificates[pem] = Certificate.read(pem)
            if len(self._certificates) > _REMEMBERED:
                self._certificates.popitem(last=False)
        # Check expiry per call, because a connection may outlive its certificate.
        if certificate.not_after < time.time():
            raise unauthenticated("the client certificate has expired")
        by_name = self._directory.current.by_certificate
        for name in certificate.names:
            if name in by_name:
                return by_name[name]
        raise unauthenticated("the client certificate is no tenant's")


@dataclass(frozen=True)
class Certificate:
    """A client certificate's names, most specific first, and its expiry in seconds since 1970."""

    names: tuple[str, ...]
    not_after: float

    @staticmethod
    def read(pem: bytes) -> "Certificate":
        """Parse PEM. Names: `URI:..` and `DNS:..` for the alternative names, then the subject as in RFC 4514."""
        from cryptography import x509

        certificate = x509.load_pem_x509_certificate(pem)
        names: list[str] = []
        try:
            other = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names += [f"URI:{name}" for name in other.get_values_for_type(x509.UniformResourceIdentifier)]
            names += [f"DNS:{name}" for name in other.get_values_for_type(x509.DNSName)]
        except x509.ExtensionNotFound:
            pass
        names.append(certificate.subject.rfc4514_string())
        return Certificate(tuple(names), certificate.not_valid_after_utc.timestamp())


def require_admin(tenant: Tenant) -> None:
    """Raise PERMISSION_DENIED unless the tenant may change what is served."""
    if not tenant.admin:
        hint = "; without a tenants file, admins need a server that listens on a loopback address"
        message = f"tenant {tenant.id} is not an admin" + (hint if tenant == OPEN_TENANT else "")
        raise RequestFailedError(grpc.StatusCode.PERMISSION_DENIED, message)


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for name, value in metadata:
        if name == "authorization" and isinstance(value, str) and value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return None
