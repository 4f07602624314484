"""`make pod` without podman: its manifests are overlay cpu's, except for the fields that its patches name."""

import contextlib
import copy
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deploy import manifests
from deploy.pod import __main__ as command
from deploy.pod import checks as module
from deploy.pod import refusals
from deploy.pod.pod import CONTAINER, FOLDER, Kubelet, Pod, PodError, quantity

needs_kustomize = pytest.mark.skipif(not shutil.which("kustomize"), reason="kustomize is not installed")
# What `podman kube play` reads.
PLAYED = {"ConfigMap", "Deployment", "PersistentVolumeClaim", "Secret"}


def by_name(found: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


@needs_kustomize
def test_the_pod_is_the_overlays_but_for_image_and_size() -> None:
    overlay, played = by_name(manifests.build(manifests.OVERLAYS / "cpu")), by_name(manifests.build(FOLDER))
    assert {kind for kind, _ in played} <= PLAYED
    assert set(played) == {name for name in overlay if name[0] in PLAYED}
    for name, manifest in played.items():
        expected = copy.deepcopy(overlay[name])
        if name[0] == "Deployment":
            (asked,), (given) = (each["spec"]["template"]["spec"]["containers"] for each in (expected, manifest))
            asked["image"] = "localhost/mtlora-server:0.1.0-cpu"
            for part in asked["resources"].values():
                part |= {"cpu": "2", "memory": "6Gi"}
            assert given == [asked]
            for volume in expected["spec"]["template"]["spec"]["volumes"]:
                if "secret" in volume:
                    volume["secret"]["defaultMode"] = 0o444
            # A patch moves what it names to the front.
            for each in (expected, manifest):
                each["spec"]["template"]["spec"]["volumes"].sort(key=lambda volume: str(volume["name"]))
        assert manifest == expected
        assert manifests.validate(manifest) == []


@needs_kustomize
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_secrets_of_the_pod_are_those_that_the_deployment_mounts(tmp_path: Path) -> None:
    pod = Pod(tmp_path, tmp_path)
    secrets = {each["metadata"]["name"]: each["stringData"] for each in pod.documents if each["kind"] == "Secret"}
    assert set(secrets) == {each["secret"]["secretName"] for each in pod.spec["volumes"] if "secret" in each}
    assert set(secrets["mtlora-tls"]) == {"tls.crt", "tls.key"}
    assert Path(pod.settings["MTLORA_TENANTS"]).name in secrets["mtlora-tenants"]
    assert [each["id"] for each in yaml.safe_load(pod._tenants(["operator"]))["tenants"]] == ["operator"]
    assert all(key not in yaml.safe_dump(secrets) for key, _ in pod.tenants.values())
    assert set(pod.ports) == {"grpc", "health", "metrics"}


@needs_kustomize
@pytest.mark.parametrize(
    ("there", "labels", "foreign"),
    [
        (set(), None, []),
        ({"mtlora-pod", "mtlora-adapters"}, None, ["pod mtlora-pod", "volume mtlora-adapters"]),
        ({"mtlora-adapters", "mtlora-tenants"}, {"mtlora.io/made-by": "make-pod"}, []),
        ({"mtlora-tenants"}, None, ["secret mtlora-tenants", "volume mtlora-tenants"]),
    ],
)
def test_a_pod_and_volumes_of_somebody_else_are_found(
    there: set[str], labels: Any, foreign: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pod, "_secrets", lambda _: [])
    monkeypatch.setattr(Pod, "_exists", lambda _, name, kind="volume": name in there)
    monkeypatch.setattr("deploy.pod.pod.run", lambda *_: json.dumps([{"Labels": labels}]))
    assert Pod(tmp_path, tmp_path).foreign() == foreign


def test_nothing_of_somebody_else_is_deleted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`remove` would fail here."""
    pod = SimpleNamespace(image="image", foreign=lambda: ["volume mtlora-tenants"])
    monkeypatch.setattr(command, "Pod", lambda *_: pod)
    monkeypatch.setattr(command, "exit_on_sigterm", lambda: None)
    monkeypatch.setattr(command.os, "geteuid", lambda: 0)
    monkeypatch.setattr(command.shutil, "which", lambda name: name)
    monkeypatch.setattr(command.Engine, "has", lambda *_: True)
    assert command.main([]) == 2
    assert "pod: found volume mtlora-tenants, not made by make pod" in capsys.readouterr().out
    monkeypatch.setattr(command.Engine, "has", lambda *_: False)
    assert command.main([]) == 2
    assert "pod: podman has no image image; make image ENGINE=buildah" in capsys.readouterr().out


def test_an_ordinary_user_is_told_that_it_needs_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.shutil, "which", lambda name: name)
    monkeypatch.setattr(command.os, "geteuid", lambda: 1000)
    assert command.main([]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("pod: needs root")


@pytest.mark.parametrize(
    ("text", "number"), [("2", 2), ("500m", 0.5), ("6Gi", 6 * 2**30), ("512Mi", 2**29), ("1.5", 1.5), ("4Ki", 4096)]
)
def test_parses_kubernetes_quantities(text: str, number: float) -> None:
    assert quantity(text) == number


class Checks:
    """Every check is met but one."""

    def __init__(self, broken: str, error: Exception) -> None:
        self._broken, self._error = broken, error
        self.serving = broken != "ready"

    def __getattr__(self, name: str) -> Any:
        def check() -> str:
            if name == self._broken:
                raise self._error
            return "found"

        # Must compare equal, like bound methods.
        return self.__dict__.setdefault(name, check)


@pytest.mark.parametrize(
    ("broken", "throughput", "met", "count"),
    [("", False, 12, 12), ("new_version", False, 11, 12), ("ready", False, 0, 12), ("", True, 13, 13),
     ("throughput", True, 12, 13)],
)  # fmt: skip
def test_checks_are_counted(
    broken: str, throughput: bool, met: int, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    checks: Any = Checks(broken, PodError("broken"))
    assert command.run_checks(checks, throughput=throughput) == (met, count)
    assert capsys.readouterr().out.count("NOT met") == bool(broken)


def test_a_check_that_breaks_otherwise_is_not_met_and_the_next_follow(capsys: pytest.CaptureFixture[str]) -> None:
    checks: Any = Checks("memory_limit", KeyError("memory"))
    assert command.run_checks(checks, throughput=False) == (11, 12)
    assert "NOT met  memory limit held under load: KeyError: 'memory'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "limit"),
    [
        ("memory.max", "6442450944\n", 6 * 2**30),
        ("memory.max", "max\n", math.inf),
        ("memory.limit_in_bytes", "9223372036854771712", 2**63 - 4096),
    ],
)
def test_memorys_limit_is_read_from_both_kinds_of_control_groups(
    name: str, content: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(Pod, "_group", lambda *_: tmp_path)
    assert Pod.__new__(Pod).memory_limit() == limit


@pytest.mark.parametrize(("found", "limit"), [(2.0, 2.0), (None, math.inf)])
def test_the_processors_limit_is_that_of_the_containers_process(
    found: float | None, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cpu_cores(own: Path) -> float | None:
        assert own == Path("/proc/7/cgroup")
        return found

    monkeypatch.setattr("deploy.pod.pod.cpu_cores", cpu_cores)
    monkeypatch.setattr(Pod, "inspect", lambda _: {"State": {"Pid": 7}})
    assert Pod.__new__(Pod).processor_limit() == limit


@pytest.mark.parametrize(
    ("limits", "refused"), [((2.0, 6 * 2**30), ""), ((math.inf, 6 * 2**30), "processor"), ((2.0, math.inf), "memory")]
)
def test_a_limit_that_is_not_in_force_is_not_held(
    limits: tuple[float, float], refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_load(*_: Any) -> set[str]:
        return set()

    monkeypatch.setattr(module, "ask", no_load)
    spent = SimpleNamespace(id=1, user_time=1.0, system_time=0.0)
    pod: Any = SimpleNamespace(
        server={"resources": {"limits": {"cpu": "2", "memory": "6Gi"}}},
        engine=lambda: SimpleNamespace(threads=lambda: [spent]),
        processor_seconds=lambda: 0.0,
        memory_peak=lambda: 2**30,
        processor_limit=lambda: limits[0],
        memory_limit=lambda: limits[1],
        inspect=lambda: {"State": {"OOMKilled": False}},
        address="",
        access=lambda _: None,
    )
    checks = module.Checks(pod, tmp_path, tmp_path)
    checks._load()
    assert checks._found["processor"][1].endswith("has no more") is (len(os.sched_getaffinity(0)) <= 2)
    for name in ("memory", "processor"):
        with contextlib.nullcontext() if name != refused else pytest.raises(PodError, match="by the manifest"):
            checks._of_load(name)


@pytest.mark.parametrize("silent", ["", "navigate"])
def test_every_task_must_answer_with_a_text(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AsyncClient(contextlib.nullcontext[Any]):
        async def __aenter__(self) -> Any:
            return self

        async def generate(self, task: str, *_: Any, **__: Any) -> SimpleNamespace:
            return SimpleNamespace(text=" \n" if task == silent else "yes")

    client: Any = SimpleNamespace(
        analyze=lambda *_, **__: [SimpleNamespace(answer="yes")], score=lambda *_: [SimpleNamespace()]
    )
    monkeypatch.setattr(module, "AsyncClient", lambda *_, **__: AsyncClient())
    monkeypatch.setattr(module, "shared_tasks", lambda _: [])
    monkeypatch.setattr(module.Checks, "_client", lambda _: contextlib.nullcontext(client))
    pod: Any = SimpleNamespace(address="", access=lambda _: None)
    with pytest.raises(PodError, match="no answer: navigate") if silent else contextlib.nullcontext():
        assert module.Checks(pod, tmp_path, tmp_path).every_task() == "25 tasks, 1 about a document, 1 scored"


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        (["killed at this container's memory limit", "engine restarted"], ""),
        (["a process of it has died", "engine restarted"], "its log names no memory limit"),
        (["killed at this container's memory limit"], "it has no other engine"),
    ],
)
def test_an_engine_without_memory_must_be_named_in_the_log(
    log: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(condition: Callable[[], bool], problem: str, timeout: float = 60.0) -> None:
        if not condition():
            raise PodError(problem)

    taken: list[bool] = []
    pod: Any = SimpleNamespace(log=lambda: "\n".join(log), wait=wait, take_memory=lambda: taken.append(True))
    monkeypatch.setattr(module.Checks, "_load", lambda checks: checks._found.update(memory=(True, "held")))
    monkeypatch.setattr(module.Checks, "_refusal", lambda *_: "")
    with pytest.raises(PodError, match=problem) if problem else contextlib.nullcontext():
        assert module.Checks(pod, tmp_path, tmp_path).memory_limit().startswith("held; ")
    assert taken


@pytest.mark.parametrize(
    ("startup", "live", "restarts"),
    # Failures of a probe in a row: as many as allowed, or one less.
    [([False, False, True], [True], 0), ([False] * 3, [True], 1), ([True], [False, True, False, True], 0),
     ([True], [False, False], 1)],
)  # fmt: skip
def test_probes_restart_the_container_as_the_manifest_says(
    startup: list[bool], live: list[bool], restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarted: list[tuple[str, ...]] = []
    monkeypatch.setattr("deploy.pod.pod.run", lambda *arguments: restarted.append(arguments))
    probes: dict[str, Any] = {
        "startupProbe": {"grpc": {"service": "ready"}, "failureThreshold": 3},
        "livenessProbe": {"grpc": {"service": "live"}, "failureThreshold": 2},
    }
    left = {"ready": startup, "live": live}

    def serving(service: str, timeout: float) -> bool:
        assert timeout == 7
        if not left[service]:
            kubelet._done.set()
        return left[service].pop(0) if left[service] else True

    pod: Any = SimpleNamespace(
        serving=serving,
        server={name: {"periodSeconds": 0, "timeoutSeconds": 7, **each} for name, each in probes.items()},
    )
    kubelet = Kubelet(pod)
    kubelet.start()
    kubelet.join(10)
    assert not kubelet.is_alive()
    assert kubelet.restarts == restarts
    assert restarted == [("restart", CONTAINER)] * restarts


@pytest.mark.parametrize(("inside", "refused"), [(99.0, False), (97.0, True)])
def test_throughput_is_compared_with_a_server_of_the_same_secrets_and_cores(
    inside: float, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    @contextlib.contextmanager
    def native_server(**settings: Any) -> Iterator[SimpleNamespace]:
        found.update(settings, cores=os.sched_getaffinity(0))
        yield SimpleNamespace(address="outside")

    monkeypatch.setattr(module, "native_server", native_server)
    monkeypatch.setattr(module, "questions", lambda _: [])
    monkeypatch.setattr(module.Checks, "_rate", lambda _, address, __: inside if address == "inside" else 100.0)
    pod: Any = SimpleNamespace(
        server={"resources": {"limits": {"cpu": "1"}}},
        settings={"MTLORA_KV_CACHE_GIB": "2", "MTLORA_GRACE_PERIOD_S": "60"},
        volume=lambda name: tmp_path / name,
        address="inside",
    )
    every = os.sched_getaffinity(0)
    with pytest.raises(PodError, match=r"0\.970") if refused else contextlib.nullcontext():
        assert module.Checks(pod, tmp_path, tmp_path).throughput().startswith("0.990")
    assert os.sched_getaffinity(0) == every
    assert found == {
        "adapters": tmp_path,
        "kv_cache_gib": "2",
        "grace_period_s": "60",
        "tenants": tmp_path / "mtlora-tenants" / "tenants.yaml",
        "tls_certificate": tmp_path / "mtlora-tls" / "tls.crt",
        "tls_key": tmp_path / "mtlora-tls" / "tls.key",
        "cores": {min(every)},
    }


@pytest.mark.parametrize(("hybrid", "tools"), [(False, ""), (True, ", runc")])
def test_missing_tools_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hybrid: bool, tools: str
) -> None:
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    monkeypatch.setattr(command, "needs_runc", lambda: hybrid)
    assert command.main([]) == 2
    assert f"pod: podman, kustomize, openssl{tools} not installed (Debian: apt-get install" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "written", "foreign", "problems"),
    [
        (1, '{"level": "info"}\nmtlora-server: SAID\n', False, 0),
        (0, "mtlora-server: SAID\n", False, 1),
        (1, "Traceback\nmtlora-server: SAID\n", False, 1),
        (1, "mtlora-server: something else\n", False, 1),
        (1, "SAID\n", False, 1),
        (1, "", False, 1),
        # What runc and crun write.
        (1, "exec /opt/mtlora/entrypoint.sh: SAID\n", True, 0),
        (1, '{"msg":"exec container process: SAID","level":"error"}\n', True, 0),
        (1, '{"level": "info"}\nSAID\n', True, 1),
    ],
)
def test_ends_that_are_not_one_clear_line_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, written: str, foreign: bool, problems: int
) -> None:
    case = refusals.Case("a case", "SAID", foreign=foreign)
    monkeypatch.setattr(refusals, "CASES", (case,))
    monkeypatch.setattr(refusals, "_run", lambda *_: (status, written))
    assert len(list(refusals.wrong_ends(None, tmp_path))) == problems  # type: ignore[arg-type]


@pytest.mark.skipif(
    Path("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists(), reason="this machine emulates the other processor"
)
def test_the_kernel_refuses_a_program_of_another_processor(tmp_path: Path) -> None:
    program = tmp_path / "foreign"
    program.write_bytes(refusals.foreign_program())
    program.chmod(0o755)
    with pytest.raises(OSError, match="Exec format error"):
        subprocess.run([program], check=True)
