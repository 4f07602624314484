"""A base image without a registry: Debian's packages, and the Python that runs this."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.image.engines import Engine, EngineError

# Libraries that the standard library and the engine link to.
_LIBRARIES = (
    "ca-certificates,libbz2-1.0,libexpat1,libffi8,libgomp1,liblzma5,libnuma1,libsqlite3-0,libssl3t64,libuuid1,zlib1g"
)
_UNWANTED = ("/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*")
# Parts of Python's own tree that no server imports.
_NO_PART = shutil.ignore_patterns(
    "__pycache__",
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "lib2to3",
    "config-*",
    "*.a",
    "_tkinter*",
)
_CONTAINERFILE = """\
FROM scratch
ADD base.tar /
COPY python /usr/local
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
RUN ldconfig && rm -f /var/cache/ldconfig/aux-cache
CMD ["python3"]
"""


def make(engine: Engine, epoch: int, *, refresh: bool = False) -> str:
    """The image's name; made unless this machine has it, or to `refresh` Debian's packages. Raises EngineError."""
    release = platform.freedesktop_os_release()
    suite = release.get("VERSION_CODENAME", "")
    name = f"localhost/mtlora-base:{suite}-python{sys.version.split()[0]}"
    if engine.has(name) and not refresh:
        return name
    if release.get("ID") != "debian":
        raise EngineError(
            "a base from packages needs Debian; elsewhere name one: make image BASE=python:3.11-slim-trixie"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _debootstrap(suite, folder / "base.tar", epoch)
        _copy_python(folder / "python")
        (folder / "Containerfile").write_text(_CONTAINERFILE)
        engine.build(folder / "Containerfile", folder, name, {}, {}, epoch)
    return name


def _debootstrap(suite: str, archive: Path, epoch: int) -> None:
    own = Path(sys.base_prefix) != Path("/usr")
    packages = _LIBRARIES if own else f"{_LIBRARIES},python3,python3-venv,python-is-python3"
    options = [f"--dpkgopt=path-exclude={path}" for path in _UNWANTED]
    options += ["--dpkgopt=path-include=/usr/share/doc/*/copyright"]
    sources = [str(path) for path in (Path("/etc/apt/sources.list.d/debian.sources"),) if path.exists()]
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", *options, suite, str(archive)]
    environment = {name: os.environ[name] for name in ("http_proxy", "https_proxy", "no_proxy") if name in os.environ}
    environment |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SOURCE_DATE_EPOCH": str(epoch)}
    done = subprocess.run([*command, *sources], env=environment)
    if done.returncode:
        raise EngineError(f"mmdebstrap ended with status {done.returncode}")


def _copy_python(to: Path) -> None:
    """The tree of the Python that runs this, for /usr/local; nothing if that Python is a Debian package."""
    prefix, version = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    to.mkdir()
    if prefix == Path("/usr"):
        return
    shutil.copytree(prefix / "lib" / version, to / "lib" / version, symlinks=True, ignore=_NO_PART)
    (to / "lib" / version / "site-packages").mkdir()
    shutil.copytree(prefix / "include" / version, to / "include" / version)
    (to / "bin").mkdir()
    shutil.copy2(prefix / "bin" / version, to / "bin")
    for name in ("python", "python3"):
        (to / "bin" / name).symlink_to(version)
    for library in (prefix / "lib").glob("libpython3*.so*"):
        shutil.copy2(library, to / "lib", follow_symlinks=False)
    if shutil.which("strip"):
        for path in (to / "bin" / version, *(to / "lib").glob("libpython3*.so.*"), *to.rglob("lib-dynload/*.so")):
            subprocess.run(["strip", "--strip-unneeded", path], check=True)
