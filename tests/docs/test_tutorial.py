"""Every command of a tutorial runs and prints what its page shows, numbers aside."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from server.cli.process import ServerProcess

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
_, _, _IMAGES = (ROOT / "docs" / "images.md").read_text().partition("\n## Your own photographs\n")
PHOTOGRAPHS = _IMAGES.partition("\n## ")[0]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Training is short, on a short backbone: only what it prints is checked.
STEPS = ("--set", "max_steps=2", "--set", "validation_per_task=1")

# Runs `mtlora` commands, one a line, in one process: each would import PyTorch and the models again.
MTLORA = """
import contextlib, io, json, sys
from mtlora.cli import main
for line in sys.stdin:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(json.loads(line))
    print(json.dumps([status, printed.getvalue()]), flush=True)
"""


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, with the lines that the page shows below it."""
    for part in block.split("$ ")[1:]:
        command, *shown = part.strip().splitlines()
        yield command, shown


def shape(line: str) -> str:
    """A line without its numbers, and without the widths that follow from them."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*", "#", line)).strip()


class Reader:
    """Runs the page's commands in an empty folder. The server listens on free ports."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        self.folder, self.backbone = folder, backbone
        self.server: ServerProcess | None = None
        self.environment = os.environ | {
            "COLUMNS": "160",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.mtlora = subprocess.Popen(
            [sys.executable, "-c", MTLORA], cwd=folder, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def type(self, command: str) -> str:
        if command.startswith("mtlora-server serve"):
            return self.serve(shlex.split(command.removesuffix("&"))[2:])
        words = shlex.split(command)
        if words[0] == "mtlora":
            return self.run_mtlora(words[1:])
        # The checkout that is tested, also where another one is installed.
        command = re.sub(r"^mtlora-server\b", f"{sys.executable} -m server", command)
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run_mtlora(self, arguments: list[str]) -> str:
        if short := {"train": STEPS, "eval": ("--examples", "1")}.get(arguments[0]):
            arguments += short
            if "my-photos" not in arguments:
                arguments += ["--backbone", str(self.backbone)]
        assert self.mtlora.stdin is not None
        assert self.mtlora.stdout is not None
        print(json.dumps(arguments), file=self.mtlora.stdin, flush=True)
        line = self.mtlora.stdout.readline()
        assert line, f"mtlora {arguments} ended its process, exit status {self.mtlora.wait()}"
        status, printed = json.loads(line)
        assert status == 0, f"mtlora {arguments}\n{printed}"
        return str(printed)

    def serve(self, flags: list[str]) -> str:
        settings = {name[2:].replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
        settings["adapters"] = str(self.folder / settings["adapters"])
        self.server = ServerProcess(**{"backbone": self.backbone, "kv_cache_gib": 0.25} | settings).__enter__()
        self.environment["MTLORA_ADDRESS"] = self.server.address
        return f"serving on {self.server.address}, metrics on {self.server.metrics}, {self.server.num_tasks} tasks"

    def run(self, code: str) -> str:
        if self.server:
            code = code.replace("127.0.0.1:50051", self.server.address)
        (self.folder / "snippet.py").write_text(code)
        return self.type("python snippet.py")


# Output that depends on training: answers of the adapter, and its scores.
FREE = {"shipping"}


def write_photographs(folder: Path) -> None:
    """Two tasks of few small images, named as those that the page shows."""
    for task, labels in (("clothing", ("pants", "t-shirt")), ("greek", ("character01", "character02"))):
        for split, count in (("train", 24), ("test", 2)):
            for i in range(count):
                path = folder / task / split / labels[i % 2] / f"{i + 1}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), (90 + 60 * (i % 2), 3 * i, len(task))).save(path)


@pytest.fixture
def reader(tmp_path: Path, short_backbone: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path, short_backbone)
    with reader.mtlora:
        yield reader
        reader.mtlora.kill()
    if reader.server:
        reader.server.__exit__()


@pytest.mark.parametrize("page", [TUTORIAL, PHOTOGRAPHS], ids=["texts", "photographs"])
def test_every_command_prints_what_the_page_shows(reader: Reader, page: str) -> None:
    write_photographs(reader.folder / "my-photos")
    for language, block in BLOCK.findall(page):
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", block)
            if name:
                (reader.folder / name[1]).write_text(block)
            else:
                reader.run(block)
            continue
        for command, shown in commands(block):
            printed = {shape(line) for line in reader.type(command).splitlines()}
            missing = [line for line in shown if line not in FREE and shape(line) not in printed]
            assert not missing, f"{command}\nshows {missing}\nprinted {sorted(printed)}"


def test_the_readme_has_the_same_commands_for_photographs() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    typed = [
        line.partition("#")[0].strip().removeprefix(".venv/bin/") for line in lines if line.startswith("    .venv")
    ]
    of_photographs = [line for line in typed if "photos" in line or "--vision-backbone" in line]
    assert len(of_photographs) == 5
    shown = [command for _, block in BLOCK.findall(PHOTOGRAPHS) for command, _ in commands(block)]
    assert of_photographs == [command.removesuffix("&").strip() for command in shown]
