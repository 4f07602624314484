"""docs/images.md asks for tasks that the shipped adapters have, or that its commands train."""

import re
from pathlib import Path

from mtlora.checkpoint.read import read_manifest
from mtlora.suite import load_suite

ROOT = Path(__file__).parents[2]


def test_tasks_asked_with_an_image_exist() -> None:
    page = (ROOT / "docs" / "images.md").read_text()
    asked = set(re.findall(r'mtlora-server ask (\w+)|\.(?:classify|generate)\("(\w+)"', page))
    lists = re.findall(r"\.classify\(\[([^\]]+)\]", page)
    named = {one or two for one, two in asked} | {name for each in lists for name in re.findall(r'"(\w+)"', each)}
    shipped = {task.id for file in ROOT.glob("adapters/*/*/adapter.json") for task in read_manifest(file.parent).tasks}
    trained = {task.id for task in load_suite("builtin-pictures").tasks}
    assert named & shipped
    # The reader's own task, in the section that test_tutorial.py runs.
    assert named <= shipped | trained | {"clothing"}
