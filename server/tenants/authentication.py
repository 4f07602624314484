"""Which tenant a call is from: by an API key in its metadata, or by its connection's client certificate."""

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from server.errors import RequestFailedError, resource_exhausted, unauthenticated
from server.tenants.config import ApiKey, Tenant
from server.tenants.directory import Directory
from server.tenants.keys import key_id_of, verify

_SCHEME = "bearer "
# Verified keys remembered, and waiting checks of one key id and of all: guesses at one id must not hold up other keys.
_REMEMBERED = 65_536
_WAITING_PER_KEY_ID = 4
_WAITING = 256


class Authenticator:
    """Maps a call to its tenant. A key is hashed once; then a keyed digest of it is remembered."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._pepper = secrets.token_bytes(32)
        # Digest of a key -> (the key it was compared with, whether they matched).
        self._verified: OrderedDict[bytes, tuple[ApiKey, bool]] = OrderedDict()
        self._running: dict[bytes, asyncio.Task[bool]] = {}
        self._waiting: dict[str, int] = {}
        self._hashing = ThreadPoolExecutor(1, "api-keys")
        self._certificates: OrderedDict[bytes, Certificate] = OrderedDict()

    async def tenant(
        self, metadata: Iterable[tuple[str, str | bytes]], auth_context: Callable[[], Mapping[str, Sequence[bytes]]]
    ) -> Tenant:
        """The caller's tenant. Raises UNAUTHENTICATED without saying which part of a key is wrong.

        `auth_context` is called only if there is no key, as it copies the connection's certificates.
        """
        tenants = self._directory.current
        if tenants.open:
            return next(iter(tenants.by_id.values()))
        if (key := _bearer(metadata)) is not None:
            return await self._by_key(key)
        if pem := auth_context().get("x509_pem_cert"):
            return self._by_certificate(pem[0])
        raise unauthenticated("no API key in metadata `authorization: Bearer KEY`, and no client certificate")

    async def _by_key(self, key: str) -> Tenant:
        digest = hashlib.blake2b(key.encode(), key=self._pepper, digest_size=32).digest()
        if (known := self._verified.get(digest)) and (tenant := self._holder(known[0])):
            self._verified.move_to_end(digest)
            if not known[1]:
                raise _wrong_key()
            return tenant
        key_id = key_id_of(key)
        found = self._directory.current.by_key_id.get(key_id) if key_id else None
        if found is None:
            raise _wrong_key()
        right = await self._is_right(digest, key, found[1])
        # Look the key up again: a reload may have revoked it during the hashing.
        holder = self._holder(found[1])
        if not right or holder is None:
            raise _wrong_key()
        return holder

    def _holder(self, key: ApiKey) -> Tenant | None:
        found = self._directory.current.by_key_id.get(key.id)
        return found[0] if found and found[1].hash == key.hash else None

    async def _is_right(self, digest: bytes, key: str, wanted: ApiKey) -> bool:
        task = self._running.get(digest)
        if task is None:
            if self._waiting.get(wanted.id, 0) >= _WAITING_PER_KEY_ID or len(self._running) >= _WAITING:
                raise resource_exhausted("too many API keys are being checked", 1.0)
            task = asyncio.create_task(self._hash(digest, key, wanted))
            self._running[digest] = task
        # Shielded, as several calls may wait for the same check.
        return await asyncio.shield(task)

    async def _hash(self, digest: bytes, key: str, wanted: ApiKey) -> bool:
        self._waiting[wanted.id] = self._waiting.get(wanted.id, 0) + 1
        try:
            right = await asyncio.get_running_loop().run_in_executor(self._hashing, verify, key, wanted.hash)
        finally:
            self._running.pop(digest, None)
            self._waiting[wanted.id] -= 1
            if not self._waiting[wanted.id]:
                del self._waiting[wanted.id]
        _remember(self._verified, digest, (wanted, right))
        return right

    def _by_certificate(self, pem: bytes) -> Tenant:
        certificate = self._certificates.get(pem)
        if certificate is None:
            certificate = Certificate.read(pem)
            _remember(self._certificates, pem, certificate)
        # A connection may outlive its certificate.
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
        raise RequestFailedError(grpc.StatusCode.PERMISSION_DENIED, f"tenant {tenant.id} is not an admin")


def _wrong_key() -> RequestFailedError:
    return unauthenticated("the API key is not one of this server's")


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for name, value in metadata:
        if name == "authorization" and isinstance(value, str) and value[: len(_SCHEME)].lower() == _SCHEME:
            return value[len(_SCHEME) :].strip()
    return None


def _remember(cache: OrderedDict, name: bytes, value: object) -> None:
    cache[name] = value
    if len(cache) > _REMEMBERED:
        cache.popitem(last=False)
