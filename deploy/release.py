"""`make dist`: build the sdist and from it the wheel, install that in an empty environment and run what is in it.

--installed: only try what this Python has installed, as cibuildwheel does with each of its wheels.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a user types first.
_COMMANDS = (["mtlora", "tasks"], ["mtlora-server", "serve", "--help"], ["mtlora-server", "new-key"])


def kernel() -> Path | None:
    """The compiled kernels of the installed package."""
    spec = find_spec("mtlora")
    return next(Path(spec.origin).parent.glob("ops/_cpu_kernel*.so"), None) if spec and spec.origin else None


def try_installed() -> None:
    """Raise SystemExit unless the package has its kernels and its commands run."""
    if kernel() is None:
        raise SystemExit("release: the package has no compiled kernels")
    for command in _COMMANDS:
        subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True, capture_output=True)
    print(f"release: {kernel()}, commands run")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.release", description=__doc__)
    parser.add_argument("--installed", action="store_true", help="only try what is installed")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: %(default)s")
    options = parser.parse_args()
    if options.installed:
        try_installed()
        return 0
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    # The wheel is built from the sdist, so a file that the sdist lacks is found.
    subprocess.run([uv, "build", "-q", "--out-dir", options.out, ROOT], check=True)
    wheel = max(options.out.glob("mtlora-*.whl"), key=lambda path: path.stat().st_mtime)
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "venv/bin/python")
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, python.parents[1]], check=True)
        named = f"mtlora[server] @ {wheel.resolve().as_uri()}"
        subprocess.run([uv, "pip", "install", "-q", "--python", python, named], check=True)
        # Away from the sources, which Python would import instead.
        subprocess.run([python, ROOT / "deploy" / "release.py", "--installed"], check=True, cwd=folder)
    print(f"release: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB, installed in an empty environment")
    return 0


if __name__ == "__main__":
    sys.exit(main())
