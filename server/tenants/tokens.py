"""Tenants by bearer tokens: JWTs that an issuer of the tenants file has signed."""

import asyncio
import hashlib
import pickle
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jwt

from mtlora.files import signature
from server.errors import unauthenticated, unavailable
from server.isolation import ChildError, Limits, in_child
from server.telemetry.logs import get_logger
from server.tenants.config import MAX_ISSUERS, Issuer, Tenant
from server.tenants.directory import Directory
from server.tenants.jwks import PublicKey, public_key, read_keys_of

logger = get_logger("tokens")

_REMEMBERED = 65_536
_TICK_S = 1.0
# Seconds between refreshes while there is no issuer. The first token of a new issuer fetches its keys.
_IDLE_TICK_S = 30.0
_REFRESH_S = 300.0
# Seconds to wait after a failure; doubled after each further one, up to _REFRESH_S.
_RETRY_S = 5.0
_FETCH_S = 10.0
# Tokens with unknown key ids share one refresh in this many seconds; at most _MAX_WAITING calls wait for it.
_UNKNOWN_KEY_S = 10.0
_MAX_WAITING = 256
# Exceptions of PyJWT besides its own, for example for an infinite expiry or deeply nested JSON.
_BAD_TOKEN = (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class _Verified:
    """A verified token: when it expires (seconds since 1970), and what verified it."""

    tenant_id: str
    expires: float
    issuer: Issuer
    keys: Mapping[str | None, PublicKey]


class Tokens:
    """Maps a token to its tenant. A token is verified once; then a keyed digest of it is remembered.

    `run` keeps the issuers' keys up to date. on_failure: gets the issuer whose keys could not be read.
    """

    def __init__(self, directory: Directory, on_failure: Callable[[str], None]) -> None:
        self._directory = directory
        self._on_failure = on_failure
        self._pepper = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        self._sources: dict[str, _KeySource] = {}
        # A thread per issuer, so that a hanging issuer does not delay others.
        self._pool = ThreadPoolExecutor(MAX_ISSUERS, "jwks")

    async def run(self) -> None:
        """Refresh keys until cancelled."""
        while True:
            issuers = self._directory.current.issuers
            wanted = {issuer.jwks or issuer.issuer for issuer in issuers.values()}
            self._sources = {place: source for place, source in self._sources.items() if place in wanted}
            for issuer in issuers.values():
                await self._source(issuer).refresh_if_due()
            await asyncio.sleep(_TICK_S if issuers else _IDLE_TICK_S)

    async def tenant(self, token: str) -> Tenant:
        """The tenant that the token names. Raises UNAUTHENTICATED, or UNAVAILABLE before the first keys are there."""
        digest = hashlib.blake2b(token.encode(), key=self._pepper, digest_size=32).digest()
        known = self._verified.get(digest)
        if known is None or not self._still_holds(known):
            try:
                known = await self._verify(token)
            except _BAD_TOKEN as error:
                raise unauthenticated(f"the token is not accepted: {error}") from None
            self._verified[digest] = known
            if len(self._verified) > _REMEMBERED:
                self._verified.popitem(last=False)
        tenant = self._directory.current.by_id.get(known.tenant_id)
        if tenant is None or known.issuer.issuer not in tenant.token_issuers:
            raise unauthenticated(f"the token's {known.issuer.tenant_claim} names no tenant of its issuer")
        return tenant

    def _still_holds(self, known: _Verified) -> bool:
        issuer = self._directory.current.issuers.get(known.issuer.issuer)
        return (
            time.time() < known.expires
            and (issuer is known.issuer or issuer == known.issuer)
            and self._source(known.issuer).keys is known.keys
        )

    async def _verify(self, token: str) -> _Verified:
        unverified = jwt.decode_complete(token, options={"verify_signature": False})
        name, key_id = unverified["payload"].get("iss"), unverified["header"].get("kid")
        issuer = self._directory.current.issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise jwt.InvalidIssuerError("its issuer is not one of this server's")
        if not isinstance(key_id, str | None):
            raise jwt.InvalidKeyError("its key id is not a string")
        source = self._source(issuer)
        keys = await source.keys_with(key_id)
        key = keys.get(key_id)
        if key is None:
            raise jwt.InvalidKeyError("the issuer has no key with this id")
        claims = jwt.decode(
            token,
            key.key,
            algorithms=[name for name in issuer.algorithms if name in key.algorithms],
            audience=issuer.audience,
            issuer=issuer.issuer,
            leeway=issuer.leeway_s,
            options={"require": ["exp", "iss", "aud"]},
        )
        tenant_id = claims.get(issuer.tenant_claim)
        if not isinstance(tenant_id, str):
            raise jwt.MissingRequiredClaimError(issuer.tenant_claim)
        return _Verified(tenant_id, float(claims["exp"]), issuer, keys)

    def _source(self, issuer: Issuer) -> "_KeySource":
        place = issuer.jwks or issuer.issuer
        source = self._sources.get(place)
        if source is None:
            source = _KeySource(issuer, self._pool, self._on_failure)
            self._sources[place] = source
        return source


class _KeySource:
    """The keys at one URL or file, by id. If a refresh fails, the old keys stay in use.

    A single key is stored under None too, so tokens need not name it.
    """

    def __init__(self, issuer: Issuer, pool: ThreadPoolExecutor, on_failure: Callable[[str], None]) -> None:
        self.keys: Mapping[str | None, PublicKey] = MappingProxyType({})
        self._issuer = issuer
        self._pool = pool
        self._on_failure = on_failure
        self._read: list[dict[str, Any]] = []
        self._seen: object = None
        self._refreshing: asyncio.Task[None] | None = None
        self._waiting = 0
        self._failures = 0
        self._due = self._may_ask = time.monotonic()

    async def refresh_if_due(self) -> None:
        """Begin a refresh in the background if its time has come, or the file has changed."""
        due = time.monotonic() >= self._due
        if file := self._issuer.keys_file:
            now = await asyncio.get_running_loop().run_in_executor(self._pool, signature, file)
            due, self._seen = due or now != self._seen, now
        if due and self._refreshing is None:
            self._begin()

    async def keys_with(self, key_id: str | None) -> Mapping[str | None, PublicKey]:
        """Return the keys, refreshed first if this one is missing. Raises UNAVAILABLE if there are none yet."""
        if key_id not in self.keys:
            now = time.monotonic()
            if self._refreshing is None and now >= self._may_ask:
                self._may_ask = now + _UNKNOWN_KEY_S
                self._begin()
            if self._refreshing is not None and self._waiting < _MAX_WAITING:
                self._waiting += 1
                try:
                    await asyncio.wait({self._refreshing})
                finally:
                    self._waiting -= 1
        if not self.keys:
            raise unavailable("the keys of the token's issuer cannot be read now", _RETRY_S)
        return self.keys

    def _begin(self) -> None:
        self._refreshing = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        try:
            found, keys = await asyncio.get_running_loop().run_in_executor(self._pool, _read_keys, self._issuer)
        except ChildError as error:
            fields = {"issuer": self._issuer.issuer, "reason": str(error)}
            logger.error("issuer's keys not read; the old ones stay in force", extra={"fields": fields})
            self._on_failure(self._issuer.issuer)
            self._due = time.monotonic() + min(_RETRY_S * 2**self._failures, _REFRESH_S)
            self._failures = min(self._failures + 1, 10)
        else:
            self._due, self._failures = time.monotonic() + _REFRESH_S, 0
            # Forget tokens that were verified with keys that have changed.
            if found != self._read:
                self._read, self.keys = found, keys
                read = {"issuer": self._issuer.issuer, "keys": len(found)}
                logger.info("issuer's keys read", extra={"fields": read})
        finally:
            self._refreshing = None


def _read_keys(issuer: Issuer) -> tuple[list[dict[str, Any]], Mapping[str | None, PublicKey]]:
    """The keys as read, and by id. Blocks. Raises ChildError."""
    found = pickle.loads(in_child(read_keys_of, issuer, limits=Limits(timeout_s=_FETCH_S))[0])
    keys: dict[str | None, PublicKey] = {jwk.get("kid"): public_key(jwk) for jwk in found}
    if len(keys) == 1:
        keys[None] = next(iter(keys.values()))
    return found, MappingProxyType(keys)
