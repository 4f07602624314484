"""The image's bill of materials, CycloneDX, while it is built:

python -m deploy.image.sbom PYTHON DPKG_STATUS BACKBONE ADAPTERS FILE

cyclonedx-bom lists what the interpreter PYTHON can import. This adds the interpreter, Debian's packages (from dpkg's
status file), and the weights in the two folders.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

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


def debian_packages(status: str) -> Iterator[Component]:
    """The installed packages of dpkg's status file."""
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            yield Component(
                name=fields["Package"],
                version=fields["Version"],
                type=ComponentType.LIBRARY,
                purl=PackageURL(
                    "deb", "debian", fields["Package"], fields["Version"], {"arch": fields["Architecture"]}
                ),
                bom_ref=f"deb:{fields['Package']}:{fields['Architecture']}",
            )


def main(argv: Sequence[str]) -> int:
    """Write the file."""
    interpreter, status, backbone, adapters, file = argv
    bom = python_packages(interpreter)
    for component in debian_packages(Path(status).read_text()):
        bom.components.add(component)
    document = json.loads(JsonV1Dot6(bom).output_as_string())
    program = "import platform, sys; print(platform.python_version(), sys.base_prefix)"
    version, prefix = subprocess.run(
        [interpreter, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    document["components"] += [*parts.interpreter(version, prefix), *parts.models(Path(backbone), Path(adapters))]
    # The same inputs give the same file.
    del document["serialNumber"], document["metadata"]["timestamp"]
    Path(file).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(f"sbom: {len(document['components'])} components")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
