"""The image's bill of materials, CycloneDX, while it is built:

python -m deploy.image.sbom PYTHON DPKG_STATUS BACKBONE ADAPTERS FILE

cyclonedx-bom lists what the interpreter PYTHON can import. This adds the interpreter, Debian's packages (from dpkg's
status file), and the weights in the two folders. SOURCE_DATE_EPOCH is its date.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.output.json import JsonV1Dot6

from deploy.image import parts


def python_packages(interpreter: str) -> Bom:
    """What this interpreter can import."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bom.json"
        subprocess.run(
            [sys.executable, "-m", "cyclonedx_py", "environment", "--no-validate", "-o", file, interpreter],
            check=True,
        )
        bom: Bom = Bom.from_json(json.loads(file.read_text()))
    return bom


def main(argv: Sequence[str]) -> int:
    """Write the file."""
    interpreter, status, backbone, adapters, file = argv
    bom = python_packages(interpreter)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    program = "import platform, sys; print(platform.python_version(), sys.base_prefix)"
    version, prefix = subprocess.run(
        [interpreter, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    release = platform.freedesktop_os_release()
    document["components"] += [
        *parts.debian_packages(Path(status).read_text(), release["VERSION_ID"]),
        *parts.interpreter(version, prefix),
        *parts.models(Path(backbone), Path(adapters)),
    ]
    # The same inputs give the same file.
    del document["serialNumber"]
    (server,) = (each["version"] for each in document["components"] if each["name"] == "mtlora")
    document["metadata"] |= parts.about(server, int(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))
    Path(file).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(f"sbom: {len(document['components'])} components")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
