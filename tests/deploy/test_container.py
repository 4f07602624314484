"""The pod's container without a cluster: entrypoint, user, read-only root, signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.harness.ports import free_port
from deploy import manifests
from mtlora.client import Client
from server.probe import main as probe
from tests.server.adapters import entry, write_adapter
from tests.server.helpers import LONG

BASE = manifests.FOLDER / "kubernetes" / "base"
REPOSITORY = manifests.FOLDER.parent
pytestmark = pytest.mark.skipif(
    not shutil.which("bwrap")
    or subprocess.run(["bwrap", "--ro-bind", "/", "/", "true"], capture_output=True).returncode != 0,
    reason="bubblewrap is not installed, or may not make namespaces here",
)


def deployment() -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((BASE / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    return spec


def settings() -> dict[str, str]:
    """The ConfigMap's variables, without tenants and certificates, which are not mounted here."""
    generators = yaml.safe_load((BASE / "kustomization.yaml").read_text())["configMapGenerator"]
    pairs = [literal.partition("=") for literal in generators[0]["literals"]]
    return {name: value for name, _, value in pairs if "/etc/mtlora" not in value}


class Container:
    """The server in a sandbox like the pod: same user, same writable folders, no capabilities, process 1."""

    def __init__(self, adapters: Path, backbone: Path) -> None:
        self.grpc, self.health, self.metrics = free_port(), free_port(), free_port()
        pod = deployment()
        user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        self.environment = {
            **settings(),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto/gen'}",
            "HOME": "/tmp",
            "TRITON_CACHE_DIR": f"{mounts['cache']}/triton",
            "VLLM_CACHE_ROOT": f"{mounts['cache']}/vllm",
            "MTLORA_BACKBONE_DIR": str(backbone),
            "MTLORA_HOST": "127.0.0.1",
            "MTLORA_METRICS_HOST": "127.0.0.1",
            "MTLORA_PORT": str(self.grpc),
            "MTLORA_HEALTH_PORT": str(self.health),
            "MTLORA_METRICS_PORT": str(self.metrics),
            "MTLORA_KV_CACHE_GIB": "0.25",
            "MTLORA_MAX_NUM_SEQS": "8",
            # The engine keeps to this worker's core.
            **{name: value for name, value in os.environ.items() if name.startswith(("OMP_", "VLLM_CPU_OMP_"))},
        }
        self.command = [
            "bwrap", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--unshare-user", "--unshare-pid",
            "--as-pid-1", "--uid", str(user), "--gid", str(group), "--cap-drop", "ALL", "--die-with-parent",
            "--tmpfs", "/var/lib", "--ro-bind", str(adapters), mounts["adapters"],
            "--tmpfs", "/opt", "--ro-bind", str(REPOSITORY / "deploy/image/entrypoint.sh"), "/opt/mtlora/entrypoint.sh",
            "--remount-ro", "/opt", "--remount-ro", "/var/lib",
            "--tmpfs", "/var/cache", "--dir", mounts["cache"], "--dir", mounts["adapter-copies"],
            "--tmpfs", mounts["tmp"], "--remount-ro", "/var/cache",
            "--tmpfs", mounts["cache"], "--tmpfs", mounts["adapter-copies"],
            # The repository may lie below a folder that the sandbox replaces.
            "--ro-bind", str(REPOSITORY), str(REPOSITORY), "--chdir", "/tmp", "--clearenv",
        ]  # fmt: skip
        for name, value in self.environment.items():
            self.command += ["--setenv", name, value]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *command], capture_output=True, text=True, timeout=60)

    def start(self, log: Path) -> subprocess.Popen[bytes]:
        entrypoint = ["/bin/sh", "/opt/mtlora/entrypoint.sh", sys.executable, "-m", "server", "serve"]
        with log.open("wb") as file:
            return subprocess.Popen([*self.command, *entrypoint], stdout=file, stderr=file)

    def well(self, service: str) -> bool:
        return probe([service, "--address", f"127.0.0.1:{self.health}", "--timeout", "2"]) == 0


@pytest.fixture(scope="module")
def container(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Container:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "a" / "1", [entry("open", stop=(), max_new_tokens=16)])
    return Container(folder, backbone)


def test_only_the_mounts_are_writable(container: Container) -> None:
    writable = [m["mountPath"] for m in deployment()["containers"][0]["volumeMounts"] if not m.get("readOnly")]
    assert sorted(writable) == ["/dev/shm", "/tmp", "/var/cache/mtlora", "/var/cache/mtlora-adapters"]
    tries = "; ".join(
        f"touch {folder}/x 2>/dev/null && echo {folder}" for folder in ("/usr", "/etc", "/opt/mtlora", *writable)
    )
    done = container.run("sh", "-c", f"id -u; {tries}; true")
    assert done.stdout.split() == ["10001", *writable]


@pytest.fixture
def server(container: Container, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = container.start(tmp_path / "log")
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_starts_serves_and_drains_in_the_pod(
    container: Container, server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    _until(lambda: container.well("live"), server, log)
    assert not container.well(manifests.SERVICE), "a starting server is live, and not ready"
    _until(lambda: container.well(manifests.SERVICE), server, log)

    with Client(f"127.0.0.1:{container.grpc}") as client:
        assert client.generate("open", "Once").summary.completion_tokens
        with urllib.request.urlopen(f"http://127.0.0.1:{container.metrics}/metrics", timeout=5) as page:
            assert b"mtlora_serving 1.0" in page.read()
        stream = client.stream("open", "Once", **LONG | {"max_new_tokens": 100})
        next(stream)
        (inside,) = psutil.Process(server.pid).children()
        inside.send_signal(signal.SIGTERM)
        _until(lambda: not container.well(manifests.SERVICE), server, log)
        assert container.well("live"), "a draining server is live, and not ready"
        assert list(stream)[-1].summary.completion_tokens > 50
    assert server.wait(60) == 0
    written = log.read_text()
    assert "Traceback" not in written, written[-4000:]


def test_images_fit_the_pods() -> None:
    """Check the Dockerfile without building it."""
    pod = deployment()
    text = (manifests.FOLDER / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in text
    stages = text.split("\nFROM ")[1:]
    for package in ("g++", "python3-dev"):
        assert [stage.splitlines()[0] for stage in stages if package in stage] == ["runtime AS build"]
    assert not any(word in stages[-1] for word in ("g++", "gcc", "make", "build-essential"))
    assert "HEALTHCHECK" in stages[-1]
    assert "STOPSIGNAL SIGTERM" in stages[-1]
    for line in text.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (REPOSITORY / source).exists(), line
    assert ":latest" not in text
    assert os.access(manifests.FOLDER / "image" / "entrypoint.sh", os.X_OK)


def _until(condition: Any, server: subprocess.Popen[bytes], log: Path, timeout: float = 180.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.3)
