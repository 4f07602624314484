"""A token issuer's public keys (JWKS, RFC 7517), from a URL or a file. Runs in a child process: issuers may lie.

The URL may come from the issuer's configuration (OpenID Connect Discovery 1.0).
"""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from server.tenants.config import ALGORITHMS, Issuer, is_fetched_safely, is_url

_MAX_BYTES = 1 << 19
_MAX_KEYS = 100
_TIMEOUT_S = 5.0
# With a larger key or exponent, checking a forged token would be expensive.
_RSA_BITS = range(2048, 4097)
_MAX_RSA_EXPONENT = 1 << 32
_PUBLIC = ("kty", "kid", "crv", "n", "e", "x", "y")


class JWKSError(ValueError):
    """No usable keys; the message says why."""


@dataclass(frozen=True)
class PublicKey:
    """A public key of `cryptography`, and the algorithms of tokens that it may check."""

    key: Any
    algorithms: frozenset[str]


def read_jwks(source: str) -> Iterator[list[dict[str, Any]]]:
    """The usable keys, without their private parts: `public_key` reads each of them. Raises JWKSError."""
    try:
        content = _fetch(source) if is_url(source) else _read(Path(source))
        found = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise JWKSError(f"{source}: {error}") from None
    listed = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(listed, list):
        raise JWKSError(f"{source}: no JSON object with a list of `keys`")
    usable = [key for each in listed[:_MAX_KEYS] if (key := _usable(each)) is not None]
    if not usable:
        raise JWKSError(f"{source}: no usable key; allowed: public keys for signatures, {', '.join(ALGORITHMS)}")
    yield usable


def read_keys_of(issuer: Issuer) -> Iterator[list[dict[str, Any]]]:
    """Like `read_jwks`, from the issuer's given URL, or from the discovered one. Raises JWKSError."""
    yield from read_jwks(_discovered(issuer.issuer) if issuer.jwks is None else issuer.jwks)


def public_key(jwk: Mapping[str, Any]) -> PublicKey:
    """The key of an entry that `read_jwks` yields."""
    return PublicKey(jwt.PyJWK({name: jwk[name] for name in _PUBLIC if name in jwk}).key, frozenset(jwk["algorithms"]))


def _discovered(issuer: str) -> str:
    """The URL of an issuer's keys. Raises JWKSError."""
    source = issuer.rstrip("/") + "/.well-known/openid-configuration"
    try:
        found = json.loads(_fetch(source))
    except (OSError, ValueError, RecursionError) as error:
        raise JWKSError(f"{source}: {error}") from None
    said, jwks = (found.get("issuer"), found.get("jwks_uri")) if isinstance(found, dict) else (None, None)
    # Reject another issuer's configuration, whose keys could sign for this one.
    if said != issuer:
        raise JWKSError(f"{source}: found issuer {said!r}; allowed: {issuer!r}")
    # Refuse addresses of this machine from a remote issuer.
    local = issuer.startswith("http://")
    if not isinstance(jwks, str) or not is_fetched_safely(jwks) or not (local or jwks.startswith("https://")):
        raise JWKSError(f"{source}: found jwks_uri {jwks!r}; allowed: an https:// URL")
    return jwks


def _usable(jwk: Any) -> dict[str, Any] | None:
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig" or not isinstance(jwk.get("kid", ""), str):
        return None
    kind = jwk.get("kty") if jwk.get("kty") == "RSA" else jwk.get("crv")
    algorithms = ALGORITHMS.get(kind, ()) if isinstance(kind, str) else ()
    public = {name: jwk[name] for name in _PUBLIC if name in jwk}
    public["algorithms"] = [name for name in algorithms if jwk.get("alg", name) == name]
    if not public["algorithms"]:
        return None
    try:
        key = public_key(public).key
        if kind == "RSA" and (key.key_size not in _RSA_BITS or key.public_numbers().e > _MAX_RSA_EXPONENT):
            return None
    # Catch everything: the libraries raise many kinds of errors for bad keys, and each means an unusable key.
    except Exception:
        return None
    return public


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return _limited(file.read(_MAX_BYTES + 1))


def _fetch(url: str) -> bytes:
    # Refuse redirections, which could lead to a server without TLS.
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=ssl.create_default_context()))
    request = urllib.request.Request(url, headers={"Accept": "application/json"})
    with opener.open(request, timeout=_TIMEOUT_S) as reply:
        return _limited(reply.read(_MAX_BYTES + 1))


def _limited(content: bytes) -> bytes:
    if len(content) > _MAX_BYTES:
        raise JWKSError(f"larger than {_MAX_BYTES} bytes")
    return content


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None
