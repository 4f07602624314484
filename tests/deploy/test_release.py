"""`make dist` without building: what it tries of the wheel, and in which environment."""

import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deploy import release

WORKFLOW: dict[str, Any] = yaml.safe_load((release.ROOT / ".github/workflows/release.yml").read_text())
PROJECT = tomllib.loads((release.ROOT / "pyproject.toml").read_text())


def test_the_commands_are_the_projects() -> None:
    assert {command[0] for command in release.COMMANDS} == set(PROJECT["project"]["scripts"])


def test_wheels_of_a_release_are_tried_with_the_same_extras() -> None:
    assert PROJECT["tool"]["cibuildwheel"]["test-extras"] == release.EXTRAS.split(",")


def test_the_environment_meets_every_extra_of_the_installed_package() -> None:
    """Asks what `make dist` asks of the lock's environment."""
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
def test_unmet_names_the_requirements_that_are_not_installed(
    requirements: list[str], unmet: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    about = importlib.metadata.metadata("numpy")
    about.add_header("Provides-Extra", "train")
    monkeypatch.setattr(release, "metadata", lambda _: about)
    monkeypatch.setattr(release, "requires", lambda _: requirements)
    assert list(release.unmet()) == unmet


@pytest.mark.parametrize(("tag", "refused"), [("manylinux_2_17_x86_64", False), ("linux_x86_64", True)])
def test_a_wheel_that_fits_no_manylinux_is_refused(tag: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f'\na.whl is consistent with the\nfollowing platform tag: "{tag}".\n\nThe wheel references'
    monkeypatch.setattr(release.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    with pytest.raises(SystemExit, match="no manylinux") if refused else contextlib.nullcontext():
        assert release.platform_tag("uv", Path("a.whl")) == tag


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


def test_nothing_is_published_before_every_other_job_has_passed() -> None:
    jobs = WORKFLOW["jobs"]
    needed, new = set[str](), {"publish"}
    while new:
        needed |= new
        new = {name for job in new for name in jobs[job].get("needs", [])} - needed
    assert needed == set(jobs)
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    installed = [line for line in commands if "pip install" in line]
    assert installed
    assert all(re.search(r"pip install [\w-]+==[\d.]+ ", line) for line in installed)


def test_wheels_are_built_from_the_sdist_that_is_published() -> None:
    """The sdist has the file that each wheel is tried with."""
    wheels = WORKFLOW["jobs"]["wheels"]
    assert "sdist" in wheels["needs"]
    assert any(each.get("run", "").endswith(" dist/*.tar.gz") for each in wheels["steps"])
    (tried,) = re.findall(r"\{project\}/(\S+)", PROJECT["tool"]["cibuildwheel"]["test-command"])
    assert f"include {tried}" in (release.ROOT / "MANIFEST.in").read_text().splitlines()


def test_no_job_of_a_release_hangs_or_is_cut_short_by_another() -> None:
    assert all(job["timeout-minutes"] <= 240 for job in WORKFLOW["jobs"].values())
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is False
