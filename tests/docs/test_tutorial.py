"""Every command of docs/tutorial.md runs and prints what the page shows, numbers aside."""

import json
import os
import re
import shlex
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
    """Types what the page says, in an empty folder. The server listens on free ports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
            return self.serve()
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
        arguments += {"train": STEPS, "eval": ("--examples", "1")}.get(arguments[0], ())
        assert self.mtlora.stdin is not None
        assert self.mtlora.stdout is not None
        print(json.dumps(arguments), file=self.mtlora.stdin, flush=True)
        line = self.mtlora.stdout.readline()
        assert line, f"mtlora {arguments} ended its process, exit status {self.mtlora.wait()}"
        status, printed = json.loads(line)
        assert status == 0, f"mtlora {arguments}\n{printed}"
        return str(printed)

    def serve(self) -> str:
        self.server = ServerProcess(adapters=self.folder / "adapters").__enter__()
        self.environment["MTLORA_ADDRESS"] = self.server.address
        return f"serving on {self.server.address}, metrics on {self.server.metrics}, {self.server.num_tasks} tasks"

    def run(self, code: str) -> str:
        if self.server:
            code = code.replace("127.0.0.1:50051", self.server.address)
        (self.folder / "snippet.py").write_text(code)
        return self.type("python snippet.py")


# What an adapter answers that was hardly trained, and lines that say how well it does.
FREE = {"shipping"}


@pytest.fixture
def reader(tmp_path: Path, backbone: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    with reader.mtlora:
        yield reader
        reader.mtlora.kill()
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
