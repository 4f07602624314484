"""API keys: 256 random bits each, stored as SHA-256 digests, found by the public id inside them.

A key is `mtk_ID_SECRET`. The secret cannot be guessed, so no slow hash is needed. A check takes a microsecond, whether
the key is right or wrong.
"""

import hashlib
import re
import secrets

KEY_ID_PATTERN = r"^[0-9a-z]{8,32}$"
# Only `new_key` makes secrets: if the file leaks, a fast digest would not protect secrets that people chose.
KEY = re.compile(r"mtk_(?P<id>[0-9a-z]{8,32})_[A-Za-z0-9_\-]{43}", re.ASCII)
_HASH = re.compile(r"sha256\$[0-9a-f]{64}", re.ASCII)


def new_key() -> tuple[str, str, str]:
    """(the key to hand out, its id, its hash for tenants.yaml)."""
    # Retry ids that YAML would read as numbers, such as 12345678 or 1e10.
    key_id = f"k{secrets.token_hex(8)}"
    key = f"mtk_{key_id}_{secrets.token_urlsafe(32)}"
    return key, key_id, hash_key(key)


def hash_key(key: str) -> str:
    """`sha256$DIGEST`, in hexadecimal, of the whole key."""
    return f"sha256${hashlib.sha256(key.encode()).hexdigest()}"


def checked_hash(text: str) -> str:
    """`text`. Raises ValueError unless it is such a hash."""
    if not _HASH.fullmatch(text):
        raise ValueError("not a key's hash; allowed: sha256$DIGEST, as `mtlora-server new-key` prints with a new key")
    return text
