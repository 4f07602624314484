"""API keys: random, stored as scrypt hashes, found by the public id inside them.

A key is `mtk_ID_SECRET`. The id says which hash to compare with, so checking a key costs one scrypt, not one for every
stored key.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

KEY_ID_PATTERN = r"^[0-9a-f]{8,32}$"
_KEY = re.compile(r"mtk_(?P<id>[0-9a-f]{8,32})_(?P<secret>[A-Za-z0-9_\-]{16,128})", re.ASCII)
_HASH = re.compile(
    r"scrypt\$ln=(?P<ln>\d{1,2}),r=(?P<r>\d{1,2}),p=(?P<p>\d{1,2})\$(?P<salt>[A-Za-z0-9+/=]+)\$(?P<digest>[A-Za-z0-9+/=]+)",
    re.ASCII,
)
# 16 MiB and tens of milliseconds a key. Nobody guesses a secret of 256 random bits; the cost protects keys that people
# choose themselves, should the file leak.
_LN, _R, _P = 14, 8, 1
_LIMITS = {"ln": (10, 18), "r": (1, 16), "p": (1, 4)}
_MAX_MEMORY = 1 << 30


@dataclass(frozen=True)
class _Hash:
    ln: int
    r: int
    p: int
    salt: bytes
    digest: bytes


def new_key() -> tuple[str, str, str]:
    """(the key to hand out, its id, its hash for tenants.yaml)."""
    key_id = secrets.token_hex(8)
    key = f"mtk_{key_id}_{secrets.token_urlsafe(32)}"
    return key, key_id, hash_key(key)


def key_id_of(key: str) -> str | None:
    """The public id inside a key; None if the text is not a key."""
    found = _KEY.fullmatch(key)
    return found["id"] if found else None


def hash_key(key: str) -> str:
    """A new salted hash: `scrypt$ln=..,r=..,p=..$SALT$DIGEST`, base64."""
    salt = secrets.token_bytes(16)
    digest = _scrypt(key, _Hash(_LN, _R, _P, salt, b"\0" * 32))
    return f"scrypt$ln={_LN},r={_R},p={_P}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def checked_hash(text: str) -> str:
    """`text`. Raises ValueError unless it is a hash that `verify` can compare with."""
    _parse(text)
    return text


def verify(key: str, text: str) -> bool:
    """Whether `text` is the hash of `key`. Takes tens of milliseconds, equally for every key; releases the GIL."""
    wanted = _parse(text)
    return hmac.compare_digest(_scrypt(key, wanted), wanted.digest)


def _parse(text: str) -> _Hash:
    found = _HASH.fullmatch(text)
    if not found:
        raise ValueError("not a hash of `mtlora-server new-key`; allowed: scrypt$ln=..,r=..,p=..$SALT$DIGEST")
    numbers = {name: int(found[name]) for name in _LIMITS}
    for name, (low, high) in _LIMITS.items():
        if not low <= numbers[name] <= high:
            raise ValueError(f"scrypt's {name}: found {numbers[name]}; allowed: {low} to {high}")
    try:
        salt, digest = (base64.b64decode(found[name], validate=True) for name in ("salt", "digest"))
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None
    if len(salt) < 8 or not 32 <= len(digest) <= 64:
        raise ValueError(f"found {len(salt)} bytes of salt, {len(digest)} of digest; allowed: from 8, and 32 to 64")
    return _Hash(**numbers, salt=salt, digest=digest)


def _scrypt(key: str, like: _Hash) -> bytes:
    return hashlib.scrypt(
        key.encode(), salt=like.salt, n=1 << like.ln, r=like.r, p=like.p, maxmem=_MAX_MEMORY, dklen=len(like.digest)
    )
