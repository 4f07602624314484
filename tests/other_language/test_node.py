"""A client in JavaScript gets the answers that a Python client gets. `make test-node` installs what it needs."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mtlora.backbone import identify
from mtlora.vision.image_input import ImageInput
from server.cli.process import ServerProcess
from tests.mtlora.vision.models import write_model
from tests.mtlora.vision.pictures import encoded, photograph
from tests.server.adapters import entry, write_adapter

HERE = Path(__file__).parent
PROTO = HERE.parents[1] / "proto" / "mtlora" / "v1" / "inference.proto"
# Side of the image that the task takes.
_SIZE = 28

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(not (HERE / "node_modules").is_dir(), reason="no node_modules: make test-node installs them"),
]


def test_a_javascript_client_gets_the_answers_of_ours(tmp_path: Path) -> None:
    eyes, adapters, image = write_model(tmp_path / "eyes", "dinov2"), tmp_path / "adapters", tmp_path / "image.jpg"
    write_adapter(adapters / "a" / "1", [entry("open", stop=(), max_new_tokens=12)])
    sight = entry("sight", allowed_answers=("near", "far"), image=ImageInput(size=_SIZE))
    write_adapter(adapters / "b" / "1", [sight], backbone=identify(eyes))
    image.write_bytes(encoded(photograph(), "JPEG"))
    with ServerProcess(adapters=adapters, kv_cache_gib=0.25, vision_backbone=eyes) as server:
        command = ["node", HERE / "client.js", server.address, PROTO, "open", "Once upon a time", "sight", image, _SIZE]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        with server.client() as client:
            answer = client.generate("open", "Once upon a time", without_adapter=True)
            grey = np.full((3, _SIZE, _SIZE), 0.5, np.float32)
            images = client.classify("sight", [image, grey, b"no image"])
    assert found["text"] == answer.text
    assert found["streamed"].strip() == answer.text
    assert found["summary"]["task_id"] == found["last_summary"]["task_id"] == "open"
    assert found["summary"]["completion_tokens"] == answer.summary.completion_tokens
    assert found["summary"]["finish_reason"].startswith("FINISH_REASON_")
    assert found["batch"] == [0, 5]
    assert found["tasks"] == ["open", "sight"]
    assert [each["code"] for each in found["images"]] == [0, 0, 3]
    assert [each["label"] for each in found["images"]] == [each.label for each in images]
    for theirs, ours in zip(found["images"], images, strict=True):
        # Batches differ, so last bits of sums differ.
        assert theirs["probabilities"] == pytest.approx(ours.probabilities, abs=1e-5)
    assert found["error"]["code"] == "NOT_FOUND"
    assert found["error"]["request_id"]
    assert found["error"]["has_details"]
