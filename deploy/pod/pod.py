"""The pod: its manifests with their secrets, played and deleted by podman; its files, processes and control groups."""

import json
import math
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml

from benchmarks.harness.ports import free_port
from benchmarks.harness.processes import process_tree
from benchmarks.harness.tenants import tenant
from deploy import manifests
from deploy.image.engines import podman
from mtlora.client import Access
from mtlora.control_group import cpu_cores
from server.probe import health

FOLDER = Path(__file__).parent
POD = "mtlora-pod"
CONTAINER = f"{POD}-server"
_ADAPTERS = "mtlora-adapters"
# Label of the volume of adapters. All that is there beside it is of `make pod`, which may delete it.
_MARK = "mtlora.io/made-by=make-pod"
# The certificate's name, as in overlay's Certificate.
_SERVER_NAME = "mtlora.mtlora.svc"
_LOOK_S = 0.2
# Runs in the container, beside the server.
_TAKE_MEMORY = """
import os
from mtlora.control_group import memory_left, out_of_memory_kills
if memory_left() is None:
    raise SystemExit("no limit of memory")
# The kernel may kill the child too: the memory of a killed engine is not free at once.
if child := os.fork():
    os.waitpid(child, 0)
    raise SystemExit
before, taken = out_of_memory_kills(), []
while out_of_memory_kills() == before:
    taken.append(b"x" * (16 << 20))
"""


class PodError(RuntimeError):
    """Podman refused, or the pod did not get there in time; the message has the end of its log."""


class Pod:
    """Overlay cpu's pod in `folder`. `play` it, then `wait_serving`; `delete` keeps its volumes, `remove` does not."""

    def __init__(self, folder: Path, adapters: Path) -> None:
        self._file = folder / "pod.yaml"
        self._folder = folder
        self.tenants = {"acme": tenant("acme"), "operator": tenant("operator", admin=True)}
        self.documents = [*manifests.build(FOLDER), *self._secrets()]
        (self.deployment,) = (each for each in self.documents if each["kind"] == "Deployment")
        self.spec: dict[str, Any] = self.deployment["spec"]["template"]["spec"]
        self.server: dict[str, Any] = self.spec["containers"][0]
        (name,) = (each["configMapRef"]["name"] for each in self.server["envFrom"])
        self.settings: dict[str, str] = next(
            each["data"] for each in self.documents if each["metadata"]["name"] == name
        )
        self._file.write_text(yaml.safe_dump_all(self.documents))
        self.ports = {each["name"]: free_port() for each in self.server["ports"]}
        self._adapters = adapters
        self.kubelet = Kubelet(self)

    @property
    def image(self) -> str:
        return str(self.server["image"])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    def access(self, name: str) -> Access:
        """A tenant's key, over TLS."""
        key, _ = self.tenants[name]
        return Access(key, ca=self._folder / "tls.crt", server_name=_SERVER_NAME)

    # Methods that start and stop the pod.

    def play(self) -> float:
        """Play the manifests; returns the `time.monotonic` of the container's start."""
        if not self._exists(_ADAPTERS):
            run("volume", "create", "--label", _MARK, _ADAPTERS)
            subprocess.run(["cp", "-r", f"{self._adapters}/.", self.volume(_ADAPTERS)], check=True)
        publish = [
            f"--publish=127.0.0.1:{self.ports[each['name']]}:{each['containerPort']}" for each in self.server["ports"]
        ]
        run("kube", "play", *publish, str(self._file))
        self.kubelet = Kubelet(self)
        self.kubelet.start()
        return time.monotonic()

    def serving(self, service: str = manifests.SERVICE, timeout: float = 3.0) -> bool:
        """The kubelet's gRPC probe of the health port."""
        try:
            return health(f"127.0.0.1:{self.ports['health']}", service, timeout) == "SERVING"
        except grpc.RpcError:
            return False

    def wait_serving(self) -> float:
        """Wait for the readiness probe; returns the `time.monotonic` at which it passed. Raises PodError."""
        return self.wait(self.serving, "it does not serve", timeout=300.0)

    def wait(self, condition: Callable[[], bool], problem: str, timeout: float = 60.0) -> float:
        """Wait for a condition; returns the `time.monotonic` at which it held. Raises PodError."""
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until or self.restarts():
                raise PodError(f"{problem}; {self.restarts()} restarts, the end of its log:\n{self.log()[-3000:]}")
            time.sleep(_LOOK_S)
        return time.monotonic()

    def delete(self) -> int:
        """Delete like the kubelet: SIGTERM, grace period, SIGKILL, then the pod's network; returns the exit status.

        `podman kube down` alone takes the network away at once. The volumes stay.
        """
        # Stop probing, as the kubelet does for a pod that it deletes.
        self.kubelet.stop()
        run("stop", CONTAINER)
        status = int(self.inspect()["State"]["ExitCode"])
        run("kube", "down", str(self._file))
        return status

    def foreign(self) -> list[str]:
        """What podman has under the names of the pod, its secrets and volumes, unless an earlier `make pod` made it."""
        if self._exists(_ADAPTERS):
            labels = json.loads(run("volume", "inspect", _ADAPTERS))[0]["Labels"] or {}
            if _MARK in (f"{name}={value}" for name, value in labels.items()):
                return []
        names = [("pod", POD), ("volume", _ADAPTERS)]
        names += [(kind, name) for name in self._secret_names() for kind in ("secret", "volume")]
        return [f"{kind} {name}" for kind, name in names if self._exists(name, kind)]

    def remove(self) -> None:
        """Delete what is left of the pod and all its volumes."""
        self.kubelet.stop()
        subprocess.run([*podman(), "kube", "down", "--force", str(self._file)], capture_output=True)
        # Podman keeps the volumes of secrets, with their old contents.
        subprocess.run([*podman(), "volume", "rm", "--force", *self._secret_names()], capture_output=True)

    # Methods that look inside the container.

    def log(self) -> str:
        done = subprocess.run([*podman(), "logs", CONTAINER], capture_output=True, text=True)
        return done.stdout + done.stderr

    def inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("inspect", CONTAINER))[0]
        return found

    def restarts(self) -> int:
        """How often the container ended or a probe failed too often, and it was started again."""
        return self.kubelet.restarts + int(self.inspect()["RestartCount"])

    def python(self, program: str) -> str:
        """What a program prints, run by the container's Python beside the server."""
        return run("exec", CONTAINER, "python", "-c", program)

    def take_memory(self) -> None:
        """Take all memory that the container may still have, until the kernel ends its engine. Raises PodError."""
        # Otherwise the kernel may kill the server, or the process that takes the memory.
        Path(f"/proc/{self.engine().pid}/oom_score_adj").write_text("1000")
        self.python(_TAKE_MEMORY)

    def volume(self, name: str) -> Path:
        """Where this machine sees a volume."""
        return Path(run("volume", "inspect", "--format", "{{.Mountpoint}}", name).strip())

    def write_tenants(self, names: Sequence[str]) -> None:
        """Change the Secret as the kubelet does: the volume's file is replaced by a rename."""
        file = self.volume("mtlora-tenants") / "tenants.yaml"
        made = file.with_name("..new")
        made.write_text(self._tenants(names))
        made.chmod(file.stat().st_mode)
        os.chown(made, file.stat().st_uid, file.stat().st_gid)
        made.rename(file)

    def processes(self) -> list[psutil.Process]:
        """The container's processes, as this machine sees them."""
        return process_tree(self.inspect()["State"]["Pid"])

    def engine(self) -> psutil.Process:
        """The engine's process: the one with the most memory."""
        return max(self.processes()[1:], key=lambda process: process.memory_info().rss)

    def memory_peak(self) -> float:
        """Bytes of the container's control group at their most."""
        return self._memory("memory.peak", "memory.max_usage_in_bytes")

    def memory_limit(self) -> float:
        """Bytes that the container's control group may take."""
        return self._memory("memory.max", "memory.limit_in_bytes")

    def processor_limit(self) -> float:
        """Cores that the container's control group may use."""
        return cpu_cores(own=Path(f"/proc/{self.inspect()['State']['Pid']}/cgroup")) or math.inf

    def processor_seconds(self) -> float:
        """Processor time of the container's control group."""
        group = self._group("cpuacct")
        if (group / "cpuacct.usage").exists():
            return int((group / "cpuacct.usage").read_text()) / 1e9
        stat = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
        return int(stat["usage_usec"]) / 1e6

    def _memory(self, *names: str) -> float:
        files = [self._group("memory") / name for name in names]
        text = next(file for file in files if file.exists()).read_text().strip()
        return math.inf if text == "max" else float(text)

    def _group(self, controller: str) -> Path:
        lines = Path(f"/proc/{self.inspect()['State']['Pid']}/cgroup").read_text().splitlines()
        groups = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
        root = Path("/sys/fs/cgroup")
        if controller in groups:
            return root / controller / groups[controller].lstrip("/")
        return root / groups[""].lstrip("/")

    def _secrets(self) -> list[dict[str, Any]]:
        """What cert-manager and the operator put into the cluster: a certificate, the tenants file."""
        key, certificate = self._folder / "tls.key", self._folder / "tls.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-subj", f"/CN={_SERVER_NAME}", "-addext", f"subjectAltName=DNS:{_SERVER_NAME}", "-days", "2",
             "-keyout", key, "-out", certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        tls = {"tls.crt": certificate.read_text(), "tls.key": key.read_text()}
        contents = {"mtlora-tenants": {"tenants.yaml": self._tenants(list(self.tenants))}, "mtlora-tls": tls}
        return [
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}
            for name, data in contents.items()
        ]

    def _secret_names(self) -> list[str]:
        return [each["secret"]["secretName"] for each in self.spec["volumes"] if "secret" in each]

    def _tenants(self, names: Sequence[str]) -> str:
        return yaml.safe_dump({"tenants": [self.tenants[name][1] for name in names]})

    def _exists(self, name: str, kind: str = "volume") -> bool:
        return subprocess.run([*podman(), kind, "exists", name], capture_output=True).returncode == 0


class Kubelet(threading.Thread):
    """The kubelet's startup and liveness probes, which podman does not make, from `start` to `stop`.

    restarts: how often a probe failed as often as the manifest allows. passed: liveness probes that did not fail.
    """

    def __init__(self, pod: Pod) -> None:
        super().__init__(daemon=True)
        self._pod = pod
        self._done = threading.Event()
        self.passed, self.restarts = 0, 0

    def run(self) -> None:
        while not self._done.is_set():
            if self._failed("startupProbe", once=True) or self._failed("livenessProbe"):
                self.restarts += 1
                run("restart", CONTAINER)

    def stop(self) -> None:
        self._done.set()
        if self.is_alive():
            self.join()

    def _failed(self, name: str, *, once: bool = False) -> bool:
        """Whether a probe failed as often in a row as it may, before it passed `once`, or before `stop`."""
        probe, in_a_row = self._pod.server[name], 0
        while in_a_row < probe["failureThreshold"]:
            if self._done.wait(probe["periodSeconds"]):
                return False
            passes = self._pod.serving(probe["grpc"]["service"], probe["timeoutSeconds"])
            if passes and once:
                return False
            self.passed += passes
            in_a_row = 0 if passes else in_a_row + 1
        return True


def run(*arguments: str, timeout: float = 180.0) -> str:
    """Podman's output. Raises PodError."""
    environment = {**os.environ, "PODMAN_IGNORE_CGROUPSV1_WARNING": "1", "DISABLE_HC_SYSTEMD": "true"}
    # Podman's monitor of a container writes a file `oom` into its working folder when memory runs out.
    done = subprocess.run(
        [*podman(), *arguments], capture_output=True, text=True, timeout=timeout, env=environment,
        cwd=tempfile.gettempdir(),
    )  # fmt: skip
    if done.returncode:
        raise PodError(f"podman {' '.join(arguments[:3])}: {done.stderr.strip()[-1500:]}")
    return done.stdout + done.stderr


def quantity(text: str) -> float:
    """A Kubernetes quantity, such as 500m or 6Gi, as a number."""
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
