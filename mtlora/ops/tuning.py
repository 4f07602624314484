"""How the Triton kernels divide their work.

`make bench-gpu TUNE=--tune` measures it for a card and writes `tuned/{card}.json`.

A file holds a list of entries, each a `Launch` with the shape that it was measured for. Defaults apply to a card or
hidden size without entries.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from mtlora.ops.table import TableLimits

FOLDER = Path(__file__).with_name("tuned")
# Fewer programs leave a card partly idle.
_ENOUGH_PROGRAMS = 128


@dataclass(frozen=True)
class Launch:
    """parts: the number of sums that x's dimensions are split into. block_*: a program's share of D, S, K and E."""

    parts: int = 1
    block_d: int = 128
    block_s: int = 128
    block_k: int = 64
    block_e: int = 128
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4
    expand_stages: int = 2


@dataclass(frozen=True)
class Tuned:
    """A launch, and the hidden size and counts of tokens and tiles that it was measured for."""

    hidden_size: int
    tokens: int
    tiles: int
    launch: Launch


def tile_size(max_tokens: int) -> int:
    """Tokens of a tile on a GPU: the smallest size of a product in decode steps, more in prefill."""
    return 16 if max_tokens <= 512 else 64


def choose(device: torch.device, hidden_size: int, tokens: int, tiles: int, limits: TableLimits) -> Launch:
    """The launch measured on this card for the nearest shape of this hidden size, else a default."""
    known = [t for t in _tuned(card(device)) if t.hidden_size == hidden_size]
    if known:
        return min(known, key=lambda t: (_apart(t.tiles, tiles), _apart(t.tokens, tokens))).launch
    return default(hidden_size, tiles)


def default(hidden_size: int, tiles: int) -> Launch:
    """A launch with enough programs for a large card, and parts of at least one block."""
    parts = 1
    while parts < 16 and parts * tiles < _ENOUGH_PROGRAMS and 2 * parts * 128 <= hidden_size:
        parts *= 2
    return Launch(parts=parts, block_e=64 if tiles < 16 else 128)


def candidates() -> Iterator[Launch]:
    """Launches worth timing."""
    for parts, block_d, block_e, block_k in itertools.product((1, 2, 4, 8, 16), (64, 128), (64, 128), (64, 128)):
        for warps in (4, 8):
            yield Launch(parts, block_d, 64, block_k, block_e, shrink_warps=warps, expand_warps=warps)


def card(device: torch.device) -> str:
    """The card's name, as in the name of its file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(name: str, entries: list[Tuned]) -> Path:
    """Write a card's measured launches."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    _tuned.cache_clear()
    return path


@cache
def _tuned(name: str) -> tuple[Tuned, ...]:
    path = FOLDER / f"{name}.json"
    entries = json.loads(path.read_text()) if path.exists() else ()
    return tuple(Tuned(**{**entry, "launch": Launch(**entry["launch"])}) for entry in entries)


def _apart(a: int, b: int) -> float:
    return max(a, b) / max(1, min(a, b))
