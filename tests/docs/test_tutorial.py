"""Every command of docs/tutorial.md runs and prints what the page shows, numbers aside."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.cli.process import ServerProcess

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Training is cut short: what it prints is checked, not what it learns.
STEPS = ("--set", "max_steps=2", "--set", "validation_per_task=1")


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block, with the lines that the page shows below it."""
    for part in block.split("$ ")[1:]:
        command, *shown = part.strip().splitlines()
        yield command, shown


def shape(line: str) -> str:
    """A line without its numbers, and without the widths that follow from them."""
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*", "#", line)).strip()


class Reader:
    """Types what the page says, in an empty folder. The server listens on free ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: ServerProcess | None = None
        self.environment = os.environ | {
            "COLUMNS": "160",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def type(self, command: str) -> str:
        if command.startswith("mtlora-server serve"):
            return self.serve()
        words = command.split()
        if words[:2] == ["mtlora", "train"]:
            command = " ".join([*words, *STEPS])
        if words[:2] == ["mtlora", "eval"]:
            command += " --examples 1"
        # The checkout that is tested, also where another one is installed.
        command = re.sub(r"^(mtlora-server|mtlora)\b", lambda tool: MODULES[tool[1]], command)
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self) -> str:
        self.server = ServerProcess(adapters=self.folder / "adapters").__enter__()
        self.environment["MTLORA_ADDRESS"] = self.server.address
        return f"serving on {self.server.address}, metrics on {self.server.metrics}, {self.server.num_tasks} tasks"

    def run(self, code: str) -> str:
        if self.server:
            code = code.replace("127.0.0.1:50051", self.server.address)
        (self.folder / "snippet.py").write_text(code)
        return self.type("python snippet.py")


MODULES = {"mtlora": f"{sys.executable} -m mtlora.cli", "mtlora-server": f"{sys.executable} -m server"}
# What an adapter answers that was hardly trained, and lines that say how well it does.
FREE = {"shipping"}


@pytest.fixture
def reader(tmp_path: Path, backbone: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    if reader.server:
        reader.server.__exit__()


def test_every_command_prints_what_the_page_shows(reader: Reader) -> None:
    for language, block in BLOCK.findall(PAGE.read_text()):
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
