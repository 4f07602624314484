"""Checks the content of a server's image. `make image` runs this file with the image's own Python.

argv[1]: JSON of the requirements that it meets, and of the distributions that it must not have. Prints JSON: a line of
what was found wrong by check, empty where it is met.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "cpp", "ld", "as", "make", "nvcc")
# An import of each way to use a server: engine, kernels, adapters, structured outputs, images, documents, TLS, tokens,
# object storage, traces, reflection, the client.
MODULES = (
    "vllm.v1.engine.async_llm", "mtlora.vllm_plugin", "vllm.lora.request", "llguidance", "xgrammar", "PIL.Image",
    "cryptography.x509", "jwt", "fsspec", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "grpc_reflection.v1alpha.reflection", "uvloop", "watchfiles", "server.app", "mtlora.client",
)  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def files() -> Iterator[Path]:
    for top in ("/usr", "/opt", "/etc", "/var", "/home", "/root", "/srv"):
        for folder, _, names in os.walk(top):
            yield from (Path(folder, name) for name in names)


def writable() -> list[str]:
    """Folders outside of those for temporary files in which this user may write."""
    allowed = ("/tmp", "/var/tmp", "/var/cache/mtlora", "/var/cache/mtlora-adapters")
    tops = ("/usr", "/opt", "/etc", "/var", "/home", "/root", "/srv")
    found = (folder for top in tops for folder, _, _ in os.walk(top) if os.access(folder, os.W_OK))
    return [folder for folder in found if not folder.startswith(allowed) and not Path(folder).is_symlink()]


def bill(installed: set[str], root: Path = Path("/")) -> str:
    """Missing and superfluous entries of the bill of materials."""
    document = json.loads((root / "opt/mtlora/sbom.cdx.json").read_text())
    components = document["components"]
    unsaid = {"component", "timestamp"} - document["metadata"].keys()
    models = [each for each in components if each["type"] == "machine-learning-model"]
    # What was installed from a folder has no address.
    addresses = (each.get("purl", f"pkg:pypi/{normal(each['name'])}") for each in components if each not in models)
    listed = {address.split("@")[0].partition("?")[0].replace("%2B", "+") for address in addresses}
    listed |= {hashed["content"] for each in models for hashed in each["hashes"]}
    there = {f"pkg:pypi/{name}" for name in installed}
    status = (root / "var/lib/dpkg/status").read_text()
    there |= {f"pkg:deb/debian/{name}" for name in re.findall(r"^Package: (.*)$", status, re.MULTILINE)}
    # Debian's own Python is one of its packages.
    there |= {"pkg:generic/python"} if sys.base_prefix != "/usr" else set()
    for pattern in ("backbone/*.safetensors", "adapters/*/*/*.safetensors"):
        files = (root / "opt/mtlora").glob(pattern)
        there |= {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return " ".join(sorted(unsaid | (listed ^ there)))


def kernel() -> str:
    from mtlora.ops.cpu_kernel import compiled_kernel

    return "" if compiled_kernel() is not None else "the package has no compiled kernel"


def imports() -> str:
    wrong = []
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:
            wrong.append(f"{module}: {type(error).__name__}: {error}")
    return "; ".join(wrong)


def main() -> None:
    """Print the findings."""
    from packaging.requirements import Requirement

    lock, never = json.loads(sys.argv[1])
    wanted = [Requirement(line) for line in lock]
    must = {normal(each.name) for each in wanted if each.marker is None or each.marker.evaluate()}
    installed = {normal(each.name) for each in distributions()}
    found = {
        "runs as user 10001": "" if os.getuid() == os.getgid() == 10001 else f"{os.getuid()}:{os.getgid()}",
        "no compiler": " ".join(name for name in COMPILERS if shutil.which(name)),
        "no static library": " ".join(map(str, (path for path in files() if path.suffix in (".a", ".o")))),
        "nothing writable but caches": " ".join(writable()),
        "no package for training, tests or development": " ".join(sorted(installed & set(never))),
        "every package of the server's lock": " ".join(sorted((must | {"mtlora", "torch"}) - installed)),
        "bill of materials is complete": bill(installed),
        "compiled kernels": kernel(),
        "every part of the server can be imported": imports(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
