"""A client in JavaScript gets the answers that a Python client gets. `make test-node` installs what it needs."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from server.cli.process import ServerProcess
from tests.server.adapters import entry, write_adapter

HERE = Path(__file__).parent
PROTO = HERE.parents[1] / "proto" / "mtlora" / "v1" / "inference.proto"

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(not (HERE / "node_modules").is_dir(), reason="no node_modules: make test-node installs them"),
]


def test_a_javascript_client(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a" / "1", [entry("open", stop=(), max_new_tokens=12)])
    with ServerProcess(adapters=tmp_path, kv_cache_gib=0.25) as server:
        done = subprocess.run(
            ["node", str(HERE / "client.js"), server.address, str(PROTO), "open", "Once upon a time"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        with server.client() as client:
            answer = client.generate("open", "Once upon a time", without_adapter=True)
    assert found["text"] == answer.text
    assert found["streamed"].strip() == answer.text
    assert found["summary"]["task_id"] == found["last_summary"]["task_id"] == "open"
    assert found["summary"]["completion_tokens"] == answer.summary.completion_tokens
    assert found["summary"]["finish_reason"].startswith("FINISH_REASON_")
    assert found["batch"] == [0, 5]
    assert found["tasks"] == ["open"]
    assert found["error"]["code"] == "NOT_FOUND"
    assert found["error"]["request_id"]
    assert found["error"]["has_details"]
