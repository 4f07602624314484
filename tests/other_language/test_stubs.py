"""The commands of docs/clients.md generate stubs, where their toolchains are."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "clients.md").read_text(), re.DOTALL)


def run(command: str, folder: Path) -> set[str]:
    """Run a block beside a copy of the contract; returns the names of the files that it made."""
    shutil.copytree(ROOT / "proto", folder / "proto", ignore=shutil.ignore_patterns("gen"))
    done = subprocess.run(["bash", "-euc", command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {path.name for path in (folder / "gen").rglob("*") if path.is_file()}


def block(word: str) -> str:
    (found,) = [each for each in BLOCKS if word in each]
    return str(found)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(not (HERE / "node_modules").is_dir(), reason="no node_modules: make test-node installs them")
def test_typescript_types_are_made_as_documented(tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(HERE / "node_modules")
    made = run(block("proto-loader-gen-types"), tmp_path)
    assert {"inference.ts", "adapters.ts", "usage.ts", "GenerateBatchRequest.ts", "UploadChunk.ts"} <= made


@pytest.mark.skipif(
    not all(map(shutil.which, ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc"))),
    reason="go, protoc, protoc-gen-go or protoc-gen-go-grpc is not installed",
)
def test_go_stubs_are_made_as_documented(tmp_path: Path) -> None:
    made = run(block("--go_out"), tmp_path)
    assert {"inference.pb.go", "inference_grpc.pb.go", "adapters_grpc.pb.go", "usage_grpc.pb.go"} <= made
