"""Container engines by their command lines: buildah, podman, docker. The standard library alone."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Chroot isolation needs no namespaces, so that a build also works inside a container; it raises limits to its defaults,
# which fails where the machine's are lower.
_LIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=90000:90000")
_CHROOT = ("--isolation", "chroot", "--network", "host", *_LIMITS)
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}


class EngineError(RuntimeError):
    """No engine, or one whose command failed; the message says which and how."""


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
            command += ["--output", f"type=docker,name={tag},rewrite-timestamp=true"]
            command += [] if cached else ["--no-cache"]
        else:
            # OCI's format has no HEALTHCHECK.
            command += ["--format", "docker", "--layers=false", "--timestamp", str(epoch), *_CHROOT]
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        for name, folder in contexts.items():
            command += ["--build-context", f"{name}={folder}"]
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
        """What a program prints that the image's Python runs, as the image's user and without a network."""
        if self.name == "buildah":
            container = _output(["buildah", "from", *_LIMITS, image]).strip()
            with contextlib.ExitStack() as after:
                after.callback(_output, ["buildah", "rm", container])
                command = ["buildah", "run", "--isolation", "chroot", container, "--", "python", "-", *arguments]
                return _output(command, program)
        command = [*self._runtime(), "run", "--rm", "-i", "--network", "none", "--read-only", "--tmpfs", "/tmp"]
        return _output([*command, "--entrypoint", "python", image, "-", *arguments], program)

    def _runtime(self) -> list[str]:
        return podman() if self.name == "podman" else [self.name]


def podman() -> list[str]:
    """Podman's command: with runc where control groups are hybrid, which crun refuses."""
    hybrid = Path("/sys/fs/cgroup/unified").exists() and shutil.which("runc")
    return ["podman", "--runtime", "runc"] if hybrid else ["podman"]


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
    if status := subprocess.run(command).returncode:
        raise EngineError(f"{command[0]} {command[1]} ended with status {status}")


def _output(command: Sequence[str], stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{' '.join(command[:4])}: {done.stderr.strip()[-2000:]}")
    return done.stdout
