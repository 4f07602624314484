"""Container engines by their command lines: buildah, podman, docker. The standard library alone."""

import contextlib
import json
import resource
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The most that a build needs of them.
_LIMITS = {"nofile": (resource.RLIMIT_NOFILE, 20000), "nproc": (resource.RLIMIT_NPROC, 90000)}
# BuildKit's answer where docker keeps its images in containerd's store.
_NO_REWRITE = 'exporter option "rewrite-timestamp" conflicts'
_KEPT_LINES = 50
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


class EngineError(RuntimeError):
    """No engine, or one whose command failed; the message says which and how, `said` has the end of its output."""

    def __init__(self, message: str, said: str = "") -> None:
        super().__init__(message)
        self.said = said


@dataclass(frozen=True)
class Engine:
    """A container engine that is installed."""

    name: str

    def build(
        self,
        file: Path,
        context: Path,
        tag: str,
        arguments: Mapping[str, str],
        contexts: Mapping[str, Path],
        epoch: int,
        *,
        cached: bool = True,
    ) -> None:
        """Build `tag`. contexts: further folders, by the name of the stage that they replace. epoch: of every file.

        cached: layers of an earlier build may be taken, where the engine keeps them.
        """
        command = [self.name, "build", "--file", str(file), "--tag", tag, "--build-arg", f"SOURCE_DATE_EPOCH={epoch}"]
        if self.name == "docker":
            command += [] if cached else ["--no-cache"]
        else:
            # OCI's format has no HEALTHCHECK.
            command += ["--format", "docker", "--layers=false", "--timestamp", str(epoch)]
            # Chroot isolation needs no namespaces, so that a build also works inside a container.
            command += ["--isolation", "chroot", "--network", "host", *limits()]
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        for name, folder in contexts.items():
            command += ["--build-context", f"{name}={folder}"]
        if self.name != "docker":
            _run([*command, str(context)])
            return
        try:
            _run([*command, "--output", f"type=docker,name={tag},rewrite-timestamp=true", str(context)])
        except EngineError as error:
            if _NO_REWRITE not in error.said:
                raise
            print("image: layers are not reproducible with this docker: its image store cannot rewrite files' dates")
            _run([*command, str(context)])

    def has(self, image: str) -> bool:
        """Whether the image is in this machine's store."""
        command = ["inspect", "--type", "image", image]
        return subprocess.run([self.name, *command], capture_output=True).returncode == 0

    def layers(self, image: str) -> list[str]:
        """The digests of the image's layers, unpacked, from the base on."""
        if self.name == "buildah":
            found = json.loads(_output(["buildah", "inspect", "--type", "image", image]))["OCIv1"]["rootfs"]["diff_ids"]
        else:
            found = json.loads(_output([self.name, "image", "inspect", image]))[0]["RootFS"]["Layers"]
        return [str(layer) for layer in found]

    def remove(self, image: str) -> None:
        """Delete the image from this machine's store."""
        _output([self.name, "rmi", image])

    def size(self, image: str) -> int:
        """Bytes of the image's layers, unpacked, as the engine counts them."""
        if self.name == "buildah":
            number, unit = json.loads(_output(["buildah", "images", "--json", image]))[0]["size"].split()
            return int(float(number) * _UNITS[unit.upper()])
        return int(_output([self.name, "image", "inspect", "--format", "{{.Size}}", image]))

    def python(self, image: str, program: str, *arguments: str) -> str:
        """What a program prints that the image's Python runs, as its user. Podman and docker give it no network."""
        if self.name == "buildah":
            container = _output(["buildah", "from", *limits(), image]).strip()
            with contextlib.ExitStack() as after:
                after.callback(_output, ["buildah", "rm", container])
                command = ["buildah", "run", "--isolation", "chroot", container, "--", "python", "-", *arguments]
                return _output(command, program)
        command = [*self._runtime(), "run", "--rm", "-i", "--network", "none", "--read-only", "--tmpfs", "/tmp"]
        return _output([*command, "--entrypoint", "python", image, "-", *arguments], program)

    def _runtime(self) -> list[str]:
        return podman() if self.name == "podman" else [self.name]


def limits() -> list[str]:
    """Options for limits. Engines raise them to defaults of their own, which fails where this machine's are lower."""
    options = []
    for name, (number, wanted) in _LIMITS.items():
        hard = resource.getrlimit(number)[1]
        least = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        options += ["--ulimit", f"{name}={least}:{least}"]
    return options


def needs_runc() -> bool:
    """Whether control groups are hybrid, which crun refuses."""
    return Path("/sys/fs/cgroup/unified").exists()


def podman() -> list[str]:
    """Podman's command, with runc where it is needed."""
    return ["podman", "--runtime", "runc"] if needs_runc() and shutil.which("runc") else ["podman"]


def find(name: str | None) -> Engine:
    """The engine of this name, or the first that is installed. Raises EngineError."""
    for each in (name,) if name else ("buildah", "podman", "docker"):
        if shutil.which(each):
            return Engine(each)
    raise EngineError(
        f"{name or 'no container engine'}: not installed; allowed: buildah, podman, docker (Debian: "
        "apt-get install buildah podman runc netavark aardvark-dns nftables fuse-overlayfs mmdebstrap)"
    )


def _run(command: Sequence[str]) -> None:
    """Run it, and pass its stderr on as it comes."""
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            sys.stderr.write(line)
            kept.append(line)
    if running.returncode:
        raise EngineError(f"{command[0]} {command[1]} ended with status {running.returncode}", "".join(kept))


def _output(command: Sequence[str], stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{' '.join(command[:4])}: {done.stderr.strip()[-2000:]}")
    return done.stdout
