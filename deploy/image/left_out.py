"""Leaves packages and files out of the image, as listed with reasons in left_out.toml. Uses only the standard library.

python -m deploy.image.left_out lock DEVICE      the lock's entries of what a server needs
python -m deploy.image.left_out remove FOLDER    delete and strip what the list names in this site-packages
python -m deploy.image.left_out show DEVICE      the list as a table
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = tomllib.loads((Path(__file__).parent / "left_out.toml").read_text())
# An entry begins where a requirement's name begins a line, and ends before the next one.
_ENTRY = re.compile(r"^(?=[A-Za-z0-9])", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9._-]+")

Reasons = dict[str, tuple[float, str]]


def packages(device: str) -> Reasons:
    """Distributions that a server's image of this device never has: megabytes and reason."""
    return LIST["packages"]["all"] | LIST["packages"].get(device, {})


def names(requirements: str) -> set[str]:
    """The distributions that a requirements file names."""
    return {name(entry) for entry in _entries(requirements)}


def lines(requirements: str) -> list[str]:
    """The requirements of such a file without their hashes and comments."""
    return [entry.splitlines()[0].rstrip(" \\") for entry in _entries(requirements)]


def server_lock(device: str) -> str:
    """The entries of requirements/DEVICE.lock, hashes included, that a server's image needs."""
    folder = ROOT / "requirements"
    wanted = names((folder / f"{device}-server.txt").read_text()) - packages(device).keys()
    return "".join(entry for entry in _entries((folder / f"{device}.lock").read_text()) if name(entry) in wanted)


def remove(site_packages: Path) -> None:
    """Delete the list's files, and strip its libraries."""
    for pattern in LIST["files"]:
        found = list(site_packages.glob(pattern))
        for path in found:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for pattern in LIST["symbols"]:
        for path in site_packages.glob(pattern):
            subprocess.run(["strip", "--strip-unneeded", path], check=True)


def table(device: str) -> str:
    """A row each: megabytes, name, reason."""
    rows = {**packages(device), **LIST["files"], **LIST["symbols"]}
    return "".join(
        f"{mb:5} MB  {name:34} {why}\n" for name, (mb, why) in sorted(rows.items(), key=lambda row: -row[1][0])
    )


def name(entry: str) -> str:
    """The distribution that a requirement names, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", _NAME.match(entry)[0]).lower()  # type: ignore[index]


def _entries(requirements: str) -> list[str]:
    return [entry for entry in _ENTRY.split(requirements) if _NAME.match(entry)]


def main(argv: Sequence[str]) -> int:
    """One of the commands above."""
    command, argument = argv
    if command == "remove":
        remove(Path(argument))
    else:
        print(server_lock(argument) if command == "lock" else table(argument), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
