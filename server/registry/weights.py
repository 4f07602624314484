"""A canary: requests split among versions by weight; a key always gets the same version."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TypeVar

from server.registry.version import version_key

MAX_WEIGHT = 10_000
_T = TypeVar("_T")

# (weight, version), in an order that does not depend on when the weights were set.
Split = tuple[tuple[int, _T], ...]


def ordered(weights: Mapping[str, int]) -> list[tuple[str, int]]:
    """Versions with a share, sorted, so that a key's version depends on the weights alone."""
    return [(version, weights[version]) for version in sorted(weights, key=version_key) if weights[version]]


def choose(split: Sequence[tuple[int, _T]], salt: str, key: bytes) -> _T:
    """The version for this key. `salt`, such as an adapter's name, makes splits independent of each other."""
    total = sum(weight for weight, _ in split)
    digest = hashlib.blake2b(key, digest_size=8, key=salt.encode()[:64]).digest()
    point = int.from_bytes(digest, "big") * total >> 64
    for weight, share in split:
        if point < weight:
            return share
        point -= weight
    raise ValueError("a split without weights")
