"""Bad adapters. Each function writes a version's folder, made from that of a healthy one."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE

Write = Callable[[Path, Path, random.Random], None]


def corrupt(healthy: Path, folder: Path, rng: random.Random) -> None:
    """Random bytes among the tensors, or in their header."""
    shutil.copytree(healthy, folder)
    file = folder / TENSORS_FILE
    content = bytearray(file.read_bytes())
    end = len(content) if rng.random() < 0.7 else 1024
    for place in rng.sample(range(end), 64):
        content[place] ^= rng.randrange(1, 256)
    file.write_bytes(content)


def truncated(healthy: Path, folder: Path, rng: random.Random) -> None:
    """One of the two files is cut off."""
    shutil.copytree(healthy, folder)
    file = folder / (TENSORS_FILE if rng.random() < 0.7 else MANIFEST_FILE)
    os.truncate(file, rng.randrange(file.stat().st_size))


def not_a_number(healthy: Path, folder: Path, rng: random.Random) -> None:
    """A NaN or an infinity among the weights, with a right checksum."""
    from safetensors.torch import load_file, save

    tensors = load_file(healthy / TENSORS_FILE)
    tensor = tensors[rng.choice(sorted(tensors))]
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf")])
    _write(folder, json.loads((healthy / MANIFEST_FILE).read_text()), save(tensors))


def wrong_backbone(healthy: Path, folder: Path, rng: random.Random) -> None:
    """Names the fingerprint of another backbone."""
    manifest = json.loads((healthy / MANIFEST_FILE).read_text())
    manifest["backbone"]["weights_fingerprint"] = f"{rng.getrandbits(256):064x}"
    _write(folder, manifest, (healthy / TENSORS_FILE).read_bytes())


def vanishing(healthy: Path, folder: Path, rng: random.Random) -> None:
    """A healthy version. The scenario removes it within moments, so it may serve or not."""
    shutil.copytree(healthy, folder)


def oversize(healthy: Path, folder: Path, rng: random.Random) -> None:
    """More bytes than the server accepts."""
    shutil.copytree(healthy, folder)
    with (folder / TENSORS_FILE).open("ab") as file:
        for _ in range(rng.randrange(65, 80)):
            file.write(rng.randbytes(1 << 20))


def symlink(healthy: Path, folder: Path, rng: random.Random) -> None:
    """A link out of the folder, to a device or a file; or the folder is a link itself."""
    target = rng.choice(["/dev/zero", "/etc/passwd", "itself", str(healthy / TENSORS_FILE)])
    if target == "itself":
        folder.symlink_to(healthy, target_is_directory=True)
        return
    shutil.copytree(healthy, folder)
    (folder / TENSORS_FILE).unlink()
    (folder / TENSORS_FILE).symlink_to(target)


def bomb(healthy: Path, folder: Path, rng: random.Random) -> None:
    """Few bytes that claim many: a sparse file, deep nesting, a header of gigabytes, a million experts, or provenance
    whose objects take a gigabyte.
    """
    kind = rng.randrange(5)
    manifest: dict[str, Any] = json.loads((healthy / MANIFEST_FILE).read_text())
    if kind == 0:
        shutil.copytree(healthy, folder)
        os.truncate(folder / TENSORS_FILE, rng.randrange(1 << 36, 1 << 40))
    elif kind == 1:
        shutil.copytree(healthy, folder)
        (folder / MANIFEST_FILE).write_bytes(b"[" * rng.randrange(1 << 20, 16 << 20))
    elif kind == 2:
        _write(folder, manifest, (1 << 62).to_bytes(8, "little") + rng.randbytes(64))
    elif kind == 3:
        shutil.copytree(healthy, folder)
        manifest["training"] = {"objects": ["OBJECTS"]}
        objects = ",".join(["[]"] * rng.randrange(8_000_000, 10_000_000))
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest).replace('"OBJECTS"', objects))
    else:
        manifest["config"]["num_experts"] = rng.randrange(1 << 20, 1 << 40)
        _write(folder, manifest, (healthy / TENSORS_FILE).read_bytes())


def _write(folder: Path, manifest: dict[str, Any], tensors: bytes) -> None:
    import hashlib

    folder.mkdir(parents=True)
    manifest["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
    (folder / TENSORS_FILE).write_bytes(tensors)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


KINDS: dict[str, Write] = {
    "corrupt": corrupt,
    "truncated": truncated,
    "NaN": not_a_number,
    "wrong backbone": wrong_backbone,
    "vanishing": vanishing,
    "oversize": oversize,
    "symlink": symlink,
    "zip-bomb-like": bomb,
}
