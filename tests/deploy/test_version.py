"""The version stands in pyproject.toml; every other place repeats it."""

import re
import tomllib
from pathlib import Path

import mtlora

ROOT = Path(__file__).parents[2]
IMAGE = re.compile(r"(?:mtlora-server:|newTag: )(\d[\w.]*)-[cg]pu\b")


def test_every_place_names_the_same_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert mtlora.__version__ == version
    files = [path for path in (ROOT / "deploy").rglob("*") if path.suffix in (".yaml", ".md", ".py", "")]
    named = {
        str(path.relative_to(ROOT)): set(IMAGE.findall(path.read_text()))
        for path in (*files, ROOT / "tests" / "deploy" / "test_pod.py")
        if path.is_file()
    }
    overlays = {f"deploy/kubernetes/overlays/{name}/kustomization.yaml" for name in ("cpu", "gpu", "multi-node")}
    places = {"deploy/README.md", "deploy/Dockerfile", "deploy/pod/kustomization.yaml", "tests/deploy/test_pod.py"}
    found = {name: versions for name, versions in named.items() if versions}
    assert found.keys() >= overlays | places
    assert {name: versions for name, versions in found.items() if versions != {version}} == {}
