"""Containers that cannot serve: each ends with one clear line and a status that is not zero."""

import platform
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.image.engines import podman
from deploy.pod.pod import Pod

_ADAPTERS, _TENANTS = "/var/lib/mtlora/adapters", "/etc/mtlora/tenants"


@dataclass(frozen=True)
class Case:
    """A container started wrongly: options of `podman run`, settings, and what its line says.

    foreign: its entrypoint is a program for another processor, so that the line is the container runtime's.
    """

    name: str
    line: str
    memory: str = "6g"
    adapters: str = "ro"
    tenants: bool = True
    settings: dict[str, str] = field(default_factory=dict)
    network: str = "none"
    foreign: bool = False


CASES = (
    Case("a limit below what the backbone needs", r"memory limit of this container is too small: found", memory="1g"),
    Case("no adapters", r"no adapter there can be served", adapters="empty"),
    Case("no volume of adapters", r"adapters: found '/var/lib/mtlora/adapters'.* not a folder", adapters="none"),
    Case("no tenants file", r"/etc/mtlora/tenants/tenants\.yaml", tenants=False),
    Case(
        "a writable volume of adapters", r"adapters_read_only: found /var/lib/mtlora/adapters writable", adapters="rw"
    ),
    Case("a port taken", r"cannot listen on .*: taken", network="host"),
    Case("an image of another architecture", r"(?i)exec format error", foreign=True),
)


def wrong_ends(pod: Pod, folder: Path) -> Iterator[str]:
    """What is wrong with the ends of such containers, a line each."""
    for case in CASES:
        with _taken_port() as port:
            status, written = _run(pod, folder, case, port)
        # Log lines are JSON; so is the only line of some runtimes.
        lines = [line for line in written.splitlines() if line and (case.foreign or not line.startswith("{"))]
        speaker = "" if case.foreign else "mtlora-server: "
        if status == 0:
            yield f"{case.name}: ended with status 0"
        elif len(lines) != 1 or not lines[0].startswith(speaker) or not re.search(case.line, lines[0]):
            yield f"{case.name}: {len(lines)} lines, the last: {lines[-1] if lines else ''}"


def _run(pod: Pod, folder: Path, case: Case, port: int) -> tuple[int, str]:
    """The container's exit status and what it wrote to stderr."""
    empty, copy = folder / "empty", folder / "writable"
    for made in (empty, copy):
        made.mkdir(exist_ok=True)
        made.chmod(0o777)
    source = {"ro": f"{pod.volume('mtlora-adapters')}:{_ADAPTERS}:ro", "empty": f"{empty}:{_ADAPTERS}:ro"}
    source["rw"] = f"{copy}:{_ADAPTERS}"
    # podman's own warnings, of cgroups v1 for one, would count as lines of the server.
    command = [*podman(), "--log-level=error", "run", "--rm"]
    command += ["--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"]
    command += [f"--memory={case.memory}", "--cpus=2", f"--network={case.network}", "--tmpfs=/tmp"]
    command += [
        f"--tmpfs={folder}:rw,mode=1777" for folder in ("/dev/shm", "/var/cache/mtlora", "/var/cache/mtlora-adapters")
    ]
    command += [f"--volume={source[case.adapters]}"] if case.adapters in source else []
    command += [f"--volume={pod.volume('mtlora-tenants')}:{_TENANTS}:ro"] if case.tenants else []
    if case.foreign:
        entrypoint = folder / "foreign"
        entrypoint.write_bytes(foreign_program())
        entrypoint.chmod(0o755)
        command += [f"--volume={entrypoint}:/opt/mtlora/entrypoint.sh:ro"]
    settings = pod.settings | case.settings
    del settings["MTLORA_TLS_CERTIFICATE"], settings["MTLORA_TLS_KEY"]
    if case.network == "host":
        settings["MTLORA_PORT"] = str(port)
    command += [f"--env={name}={value}" for name, value in settings.items()]
    done = subprocess.run([*command, pod.image], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def foreign_program() -> bytes:
    """The header of an ELF program for another processor than this machine's; the kernel reads no further."""
    machine = 62 if platform.machine() == "aarch64" else 183
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    return identity + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 0, 0, 0, 0)


@contextmanager
def _taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        yield int(taken.getsockname()[1])
