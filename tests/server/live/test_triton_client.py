"""Triton's own client gets the answers that ours gets. `make test-triton` installs it."""

import json
import subprocess
from pathlib import Path

import pytest

from mtlora.client import Client
from server.cli.process import ServerProcess
from tests.server.adapters import entry
from tests.server.live.published import published

# Its environment and script run apart from this project's.
FOLDER = Path(__file__).parents[2] / "other_language"
INSTALLED = FOLDER / ".venv" / ".installed"
LABELS = ("left", "right", "straight on")
TEXTS = ["Once upon a time", "The door is ajar."]


@pytest.mark.skipif(not INSTALLED.exists(), reason="no Triton client: make test-triton installs it")
def test_tritons_client_gets_the_answers_of_ours(adapters: Path, server: ServerProcess, client: Client) -> None:
    properties = {"open": {"type": "boolean"}, "size": {"enum": ["small", "large"]}}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    written = entry("record", answer={"type": "json", "schema": schema}, max_new_tokens=48)
    with published(adapters / "triton", client, [entry("choice", allowed_answers=LABELS), written]):
        command = [INSTALLED.parent / "bin" / "python", FOLDER / "triton_client.py", server.address, "choice", "record"]
        done = subprocess.run([*map(str, command), *TEXTS], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        tasks = sorted(task.id for task in client.tasks())
        scores = client.score("choice", TEXTS)
        record = client.generate("record", TEXTS[0])
    found = json.loads(done.stdout)
    assert found["ready"]
    assert {"choice", "record"} < set(tasks)
    assert sorted(found["index"]) == tasks
    assert (found["metadata"]["name"], found["metadata"]["versions"]) == ("choice", ["1"])
    assert [(tensor["name"], tensor["datatype"]) for tensor in found["metadata"]["outputs"]] == [
        ("text_output", "BYTES"), ("label", "BYTES"), ("probabilities", "FP32"), ("labels", "BYTES"),
    ]  # fmt: skip
    assert found["label"] == [score.label for score in scores]
    assert found["labels"] == list(LABELS)
    assert found["datatype"] == "float32"
    for theirs, ours in zip(found["probabilities"], scores, strict=True):
        # Batches differ, so last bits of sums differ.
        assert theirs == pytest.approx([ours.probabilities[label] for label in LABELS], abs=1e-2)
    assert found["json"] == [record.text]
    assert json.loads(record.text).keys() == properties.keys()
    assert found["id"] == "7"
    assert found["prompt_tokens"] == record.summary.prompt_tokens
    errors = {"no_task": "NOT_FOUND", "cold": "INVALID_ARGUMENT", "timeout": "INVALID_ARGUMENT"}
    errors |= {"late": "DEADLINE_EXCEEDED", "config": "UNIMPLEMENTED"}
    assert {name: found[name][0] for name in errors} == {name: f"StatusCode.{code}" for name, code in errors.items()}
    assert found["cold"][1] == "parameters.temperature: found -1; allowed: 0 to 2"
