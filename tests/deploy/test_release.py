"""`make dist` without building: what it tries of the wheel, and in which environment."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from deploy import release

PROJECT = tomllib.loads((release.ROOT / "pyproject.toml").read_text())


def test_the_commands_are_the_projects() -> None:
    assert {command[0] for command in release.COMMANDS} == set(PROJECT["project"]["scripts"])


def test_wheels_of_a_release_are_tried_with_the_same_extras() -> None:
    assert PROJECT["tool"]["cibuildwheel"]["test-extras"] == release.EXTRAS.split(",")


def test_the_environment_meets_every_extra_of_the_installed_package() -> None:
    """As `make dist` asks of the lock's."""
    assert list(release.unmet()) == []


@pytest.mark.parametrize(
    ("requirements", "unmet"),
    [
        (["numpy"], []),
        (["numpy<1"], ["numpy<1"]),
        (["nowhere-to-be-found"], ["nowhere-to-be-found"]),
        (['nowhere-to-be-found; extra == "train"'], ['nowhere-to-be-found; extra == "train"']),
        (['nowhere-to-be-found; extra == "other"'], []),
        (['nowhere-to-be-found; python_version < "3"'], []),
    ],
)
def test_requirements_that_are_not_met(
    requirements: list[str], unmet: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    about = importlib.metadata.metadata("numpy")
    about.add_header("Provides-Extra", "train")
    monkeypatch.setattr(release, "metadata", lambda _: about)
    monkeypatch.setattr(release, "requires", lambda _: requirements)
    assert list(release.unmet()) == unmet


def test_borrowed_packages_come_after_the_environments_own(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    release.borrow_packages(python)
    (own,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (own / "numpy.py").touch()
    program = "import numpy, packaging; print(numpy.__file__, packaging.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True, env=environment)
    first, second = map(Path, done.stdout.split())
    assert first == own / "numpy.py"
    assert second.is_relative_to(sys.prefix)
    # This project, installed as editable here, must be the wheel's there.
    done = subprocess.run([python, "-c", "import mtlora"], cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode != 0
