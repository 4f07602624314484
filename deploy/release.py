"""`make dist`: build the sdist and from it the wheel, and try the wheel in two environments.

An empty one gets what the package index gives for extras server and loadtest, and runs the commands. One of the lock's
packages, those of the Python that runs this, has all extras, loads the kernels and answers a request.

auditwheel names the oldest Linux on which the kernels load.

--installed: only run the commands of what this Python has installed, as cibuildwheel does with each of its wheels.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Extra train needs torch: the lock's environment has that.
EXTRAS = "server,loadtest"
AUDITWHEEL = "auditwheel==6.8.2"
# Commands that a user runs first.
COMMANDS = (
    ["mtlora", "tasks"],
    ["mtlora-server", "serve", "--help"],
    ["mtlora-server", "new-key"],
    ["mtlora-loadtest", "--help"],
)


def kernel() -> Path | None:
    """The compiled kernels of the installed package."""
    spec = find_spec("mtlora")
    return next(Path(spec.origin).parent.glob("ops/_cpu_kernel*.so"), None) if spec and spec.origin else None


def try_installed() -> None:
    """Raise SystemExit unless the package has its kernels and its commands run."""
    if kernel() is None:
        raise SystemExit("release: the package has no compiled kernels")
    for command in COMMANDS:
        subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True, capture_output=True)
    print(f"release: {kernel()}, commands run")


def try_locked() -> None:
    """Raise SystemExit unless all extras are there, the kernels load, and a server of the package answers."""
    if missing := list(unmet()):
        raise SystemExit(f"release: the lock lacks {', '.join(missing)}")
    import mtlora.cli.train
    from mtlora.ops.cpu_kernel import compiled_kernel
    from server.cli.process import ServerProcess

    if not Path(mtlora.cli.train.__file__).is_relative_to(sys.prefix):
        raise SystemExit(f"release: not the wheel's: {mtlora.cli.train.__file__}")
    if compiled_kernel() is None:
        raise SystemExit("release: the kernels do not load")
    # One backbone's adapter alone: one engine starts.
    with tempfile.TemporaryDirectory() as adapters, contextlib.ExitStack() as stack:
        shutil.copytree(ROOT / "adapters" / "builtin", Path(adapters, "builtin"))
        server = stack.enter_context(ServerProcess(adapters=adapters, kv_cache_gib=0.25))
        client = stack.enter_context(server.client())
        answer = client.generate("boolean_expressions", "not ( True ) and False", timeout=120)
    if not answer.text:
        raise SystemExit("release: no answer")
    print(f"release: all extras, kernels loaded, {server.num_tasks} tasks served, answered: {answer.text!r}")


def unmet() -> Iterator[str]:
    """Requirements of the installed package and its extras that this environment does not meet."""
    from packaging.requirements import Requirement

    extras = ["", *(metadata("mtlora").get_all("Provides-Extra") or [])]
    for each in map(Requirement, requires("mtlora") or []):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
            try:
                met = each.specifier.contains(version(each.name), prereleases=True)
            except PackageNotFoundError:
                met = False
            if not met:
                yield str(each)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.release", description=__doc__)
    parser.add_argument("--installed", action="store_true", help="only try what is installed")
    parser.add_argument("--locked", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: %(default)s")
    options = parser.parse_args()
    if options.installed:
        try_installed()
        return 0
    if options.locked:
        try_locked()
        return 0
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    # The wheel is built from the sdist, so a file that the sdist lacks is found.
    subprocess.run([uv, "build", "-q", "--out-dir", options.out, ROOT], check=True)
    wheel = max(options.out.glob("mtlora-*.whl"), key=lambda path: path.stat().st_mtime)
    tag = platform_tag(uv, wheel)
    with tempfile.TemporaryDirectory() as folder:
        empty, locked = (environment(uv, Path(folder, name)) for name in ("empty", "locked"))
        named = f"mtlora[{EXTRAS}] @ {wheel.resolve().as_uri()}"
        subprocess.run([uv, "pip", "install", "-q", "--python", empty, named], check=True)
        attempt(empty, "--installed", Path(folder))
        borrow_packages(locked)
        subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--python", locked, wheel], check=True)
        attempt(locked, "--locked", Path(folder))
    size = f"{wheel.stat().st_size / 1e6:.1f} MB"
    print(f"release: {wheel.name}, {size}, {tag}, tried in an empty environment and in the lock's")
    return 0


def platform_tag(uv: str, wheel: Path) -> str:
    """The oldest manylinux that the wheel's kernels fit. Raises SystemExit if they fit none."""
    command = [uv, "tool", "run", "-q", "--python", sys.executable, AUDITWHEEL, "show", str(wheel)]
    said = " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    found = re.search(r'platform tag: "(manylinux_\w+)"', said)
    if not found:
        raise SystemExit(f"release: fits no manylinux: {said}")
    return found[1]


def environment(uv: str, folder: Path) -> Path:
    """Make an environment without packages; returns its Python."""
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
    return folder / "bin" / "python"


def borrow_packages(python: Path) -> None:
    """Let an environment import the packages of this one, after its own; editable installations stay out."""
    (own,) = python.parents[1].glob("lib/python*/site-packages")
    (own / "lock.pth").write_text(sysconfig.get_path("purelib") + "\n")


def attempt(python: Path, option: str, folder: Path) -> None:
    """Run code in an environment, outside the source folder, from which Python would import instead."""
    subprocess.run([python, ROOT / "deploy" / "release.py", option], check=True, cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
