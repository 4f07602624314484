"""The twelve checks of `make pod`, in their order: each returns a line of what it found, or raises PodError."""

import asyncio
import contextlib
import json
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks.harness.asking import closed_loop
from benchmarks.harness.environment import on_cores, usable_cores
from benchmarks.harness.native_server import native_server
from deploy.pod.pod import Pod, PodError, quantity
from deploy.pod.refusals import wrong_ends
from mtlora.checkpoint.publish import publish
from mtlora.client import Access, AsyncClient, Client, ServerError
from mtlora.suite import load_suite
from mtlora.suite.base import Example
from server.cli.analyze import shared_tasks
from server.cli.process import ServerProcess

START_GOAL_S = 25.0
THROUGHPUT_GOAL = 0.98
_IN_FLIGHT = 32
# Rounds of the throughput check.
_ROUNDS = 5
# Streams that are open when the pod is deleted, and their tokens.
_STREAMS = 8
_TOKENS = 300
_LONG: dict[str, Any] = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "free": True, "without_adapter": True}
# What the server logs when the kernel has ended its engine, and once another one serves.
_OUT_OF_MEMORY = "killed at this container's memory limit"
_RESTARTED = "engine restarted"
# A thread computes if it takes this share of the busiest one's processor time.
_BUSY = 0.25


@dataclass
class Checks:
    """One run of the checks on `pod`. serving: whether the pod serves, so that the next check can ask it."""

    pod: Pod
    adapters: Path
    folder: Path
    serving: bool = False
    _found: dict[str, tuple[bool, str]] = field(default_factory=dict)

    def ready(self) -> str:
        """The startup probe passes."""
        began = self.pod.play()
        seconds = self.pod.wait_serving() - began
        self.serving = True
        line = f"serving {seconds:.1f} s after the container's start (at most {START_GOAL_S:.0f})"
        expect(seconds <= START_GOAL_S, line)
        return line

    def as_the_manifest_says(self) -> str:
        """User, capabilities, privileges, system calls, root, mounts and settings inside are those of the manifest."""
        found = json.loads(self.pod.python(_INSIDE))
        user, asked = self.pod.spec["securityContext"], self.pod.server["securityContext"]
        expect(found["uid"] == user["runAsUser"] and found["gid"] == user["runAsGroup"], f"user {found['uid']}")
        expect(int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0, f"capabilities {found['CapBnd']}")
        expect(asked["allowPrivilegeEscalation"] or found["NoNewPrivs"] == "1", "privileges can grow")
        expect(found["Seccomp"] == "2", "no seccomp profile")
        options = {"/": asked["readOnlyRootFilesystem"]}
        options |= {each["mountPath"]: each.get("readOnly", False) for each in self.pod.server["volumeMounts"]}
        wrong = [path for path, read_only in options.items() if ("ro" in found["mounts"].get(path, [])) != read_only]
        expect(not wrong, f"read-only is not as the manifest says: {wrong}")
        missing = [name for name, value in self.pod.settings.items() if found["environment"].get(name) != value]
        expect(not missing, f"settings that are not the ConfigMap's: {missing}")
        return f"user {found['uid']}, no capability, seccomp, {len(options)} mounts, {len(self.pod.settings)} settings"

    def every_task(self) -> str:
        """Each built-in task is answered with a text; documents and scores too."""
        examples = questions(1)
        answered = asyncio.run(ask(self.pod.address, self.pod.access("acme"), examples))
        silent = sorted({task.id for task in load_suite("builtin").tasks} - answered)
        expect(not silent, f"no answer: {', '.join(silent)}")
        with self._client() as client:
            document = str(load_suite("documents").examples(load_suite("documents").tasks[0].id, "test", 1, 0)[0].input)
            about = [each for each in client.analyze(shared_tasks(client), document, timeout=300) if each.answer]
            expect(bool(about), "no answer about a document")
            scores = client.score("navigate", [next(each.input for each in examples if each.task_id == "navigate")])
        return f"{len(answered)} tasks, {len(about)} about a document, {len(scores)} scored"

    def new_version(self) -> str:
        """A version put into the volume serves, without a restart."""
        folder = self.pod.volume("mtlora-adapters") / "builtin"
        made = publish(folder / self._version(), folder)
        began = time.monotonic()
        self.pod.wait(lambda: self._version() == made.name, f"version {made.name} does not serve")
        return f"version {made.name} of builtin serves {time.monotonic() - began:.1f} s after it came"

    def revoked_key(self) -> str:
        """A key taken out of the Secret is refused; the others still work."""
        self.pod.write_tenants(["operator"])
        began = time.monotonic()
        self.pod.wait(lambda: self._refusal("acme") == "UNAUTHENTICATED", "the key still works")
        took = time.monotonic() - began
        expect(self._refusal("operator") == "", "another tenant's key is refused too")
        self.pod.write_tenants(list(self.pod.tenants))
        self.pod.wait(lambda: self._refusal("acme") == "", "the key that was given back does not work")
        return f"refused {took:.1f} s after the file changed"

    def _load(self) -> None:
        limits = self.pod.server["resources"]["limits"]
        cores, memory = quantity(limits["cpu"]), quantity(limits["memory"])
        engine = self.pod.engine()
        threads = {each.id: each.user_time + each.system_time for each in engine.threads()}
        used, began = self.pod.processor_seconds(), time.monotonic()
        asyncio.run(ask(self.pod.address, self.pod.access("acme"), questions(6)))
        rate = (self.pod.processor_seconds() - used) / (time.monotonic() - began)
        spent = [each.user_time + each.system_time - threads.get(each.id, 0.0) for each in engine.threads()]
        busy = sum(each > _BUSY * max(spent) for each in spent)
        wanted = self._cores()
        peak, bytes_allowed = self.pod.memory_peak(), self.pod.memory_limit()
        cores_allowed = self.pod.processor_limit()
        killed = self.pod.inspect()["State"]["OOMKilled"]
        # If the machine has fewer cores than the limit, check only the limit's value.
        more = "" if len(usable_cores()) > cores else ", and the machine has no more"
        self._found = {
            "memory": (
                bytes_allowed == memory and not killed,
                f"{peak / 1e9:.2f} GB at most, limit {bytes_allowed / 1e9:.2f} GB, by the manifest "
                f"{memory / 1e9:.2f} GB",
            ),
            "processor": (
                cores_allowed == cores and rate <= 1.02 * cores,
                f"{rate:.2f} cores used, limit {cores_allowed:g}, by the manifest {cores:g}{more}",
            ),
            "threads": (busy == wanted, f"{busy} threads of the engine compute, {wanted} cores"),
        }

    def memory_limit(self) -> str:
        """Memory of the control group under a closed loop; the same load serves the next two checks.

        Then a process takes all the memory that is left: the kernel ends the engine, and the server says why.
        """
        self._load()
        line = self._of_load("memory")
        self.pod.take_memory()
        self.pod.wait(lambda: _OUT_OF_MEMORY in self.pod.log(), "its log names no memory limit")
        self.pod.wait(lambda: _RESTARTED in self.pod.log(), "it has no other engine", timeout=300)
        expect(self._refusal("acme") == "", "no answer afterwards")
        return f"{line}; one process more: the engine ended, its log says why, another serves"

    def processor_limit(self) -> str:
        """Processor time of the control group over the load's time."""
        return self._of_load("processor")

    def engine_threads(self) -> str:
        """Threads of the engine that took a fair part of the processor time."""
        return self._of_load("threads")

    def _of_load(self, name: str) -> str:
        expect(name in self._found, "the load failed")
        met, line = self._found[name]
        expect(met, line)
        return line

    def engine_killed(self) -> str:
        """Another engine starts in the same container, which stays live."""
        passed = self.pod.kubelet.passed
        engine = self.pod.engine()
        engine.send_signal(signal.SIGKILL)
        began = time.monotonic()
        self.pod.wait(lambda: not self.pod.serving(), "it still serves without an engine")
        took = self.pod.wait_serving() - began
        passed = self.pod.kubelet.passed - passed
        expect(self.pod.restarts() == 0, "the container restarted")
        expect(self._refusal("acme") == "", "no answer afterwards")
        return f"serves again after {took:.1f} s, {passed} liveness probes passed meanwhile"

    def deleted_while_streaming(self) -> str:
        """Streams that run when the pod is deleted end as they would have."""
        first = threading.Semaphore(0)
        ends: list[int | Exception] = []
        ended: list[float] = []

        def stream() -> None:
            with self._client(retry=None) as client:
                tokens = client.stream("navigate", "Once", timeout=120, **_LONG)
                try:
                    next(tokens)
                    first.release()
                    ends.append(list(tokens)[-1].summary.completion_tokens)
                    ended.append(time.monotonic())
                except (ServerError, grpc.RpcError) as error:
                    first.release()
                    ends.append(error)

        running = [threading.Thread(target=stream) for _ in range(_STREAMS)]
        for each in running:
            each.start()
        for _ in running:
            first.acquire(timeout=60)
        began = time.monotonic()
        status = self.pod.delete()
        took = time.monotonic() - began
        for each in running:
            each.join()
        broken = [str(end) for end in ends if not isinstance(end, int)]
        expect(not broken, f"{len(broken)} of {_STREAMS} streams broken: {broken[:1]}")
        expect(status == 0, f"the container ended with status {status}")
        expect(ends == [_TOKENS] * _STREAMS, f"streams that are not whole: {ends} of {_STREAMS}")
        expect(min(ended) > began, "streams that had ended before the pod was deleted")
        return f"{_STREAMS} streams of {_TOKENS} tokens, none broken; gone after {took:.1f} s"

    def started_again(self) -> str:
        """The pod starts again on the same volumes, and serves what was published into them."""
        self.serving = False
        began = self.pod.play()
        took = self.pod.wait_serving() - began
        self.serving = True
        version = self._version()
        versions = [each.name for each in (self.pod.volume("mtlora-adapters") / "builtin").iterdir()]
        newest = max(filter(str.isdecimal, versions), key=int)
        expect(version == newest, f"version {version} serves, {newest} is the newest in the volume")
        return f"serving after {took:.1f} s, version {version}"

    def refusals(self) -> str:
        """Containers that cannot serve say why."""
        wrong = list(wrong_ends(self.pod, self.folder))
        expect(not wrong, "; ".join(wrong))
        return (
            "memory, adapters, tenants, a writable volume, a taken port, another processor: one line each, status not 0"
        )

    def throughput(self) -> str:
        """Requests a second in the container ÷ outside of it: same settings, TLS, tenants and cores, in turn."""
        examples = questions(8)
        with self._server_outside() as server:
            places = (self.pod.address, server.address)
            for address in places:
                self._rate(address, examples)
            ratios = []
            for number in range(_ROUNDS):
                # The order changes from round to round.
                order = places[:: -1 if number % 2 else 1]
                rates = {address: self._rate(address, examples) for address in order}
                ratios.append(rates[self.pod.address] / rates[server.address])
        ratio = statistics.median(ratios)
        line = f"{ratio:.3f} of the requests a second outside, median of {_ROUNDS} (at least {THROUGHPUT_GOAL})"
        expect(ratio >= THROUGHPUT_GOAL, line)
        return line

    @contextlib.contextmanager
    def _server_outside(self) -> Iterator[ServerProcess]:
        """A server on this machine with what the pod's has: secrets, settings, as many cores."""
        settings = {
            name: self.pod.settings[f"MTLORA_{name.upper()}"] for name in ("kv_cache_gib", "grace_period_s")
        } | {
            "adapters": self.adapters,
            "tenants": self.pod.volume("mtlora-tenants") / "tenants.yaml",
            "tls_certificate": self.pod.volume("mtlora-tls") / "tls.crt",
            "tls_key": self.pod.volume("mtlora-tls") / "tls.key",
        }
        with contextlib.ExitStack() as stack:
            # The clients keep all cores.
            with on_cores(usable_cores()[: self._cores()]):
                server = stack.enter_context(native_server(**settings))
            yield server

    def _rate(self, address: str, examples: Sequence[Example]) -> float:
        began = time.monotonic()
        asyncio.run(ask(address, self.pod.access("acme"), examples))
        return len(examples) / (time.monotonic() - began)

    def _cores(self) -> int:
        """Cores that the pod's server computes on."""
        return min(int(quantity(self.pod.server["resources"]["limits"]["cpu"])), len(usable_cores()))

    def _client(self, tenant: str = "acme", **options: Any) -> Client:
        return Client(self.pod.address, self.pod.access(tenant), **options)

    def _version(self) -> str:
        """The version of adapter builtin that answers."""
        example = questions(1)[0]
        with self._client() as client:
            return str(client.generate(example.task_id, example.input, timeout=120).summary.adapter_version)

    def _refusal(self, tenant: str) -> str:
        """The status of a request with this tenant's key; empty if it is answered."""
        example = questions(1)[0]
        try:
            with self._client(tenant) as client:
                client.generate(example.task_id, example.input, timeout=120)
        except ServerError as error:
            return str(error.code.name)
        return ""


def questions(per_task: int) -> list[Example]:
    """The same number of questions of every built-in task; tasks in turn, so that every batch mixes them."""
    suite = load_suite("builtin")
    by_task = [suite.examples(task.id, "test", per_task, 0) for task in suite.tasks]
    return [example for each in zip(*by_task, strict=True) for example in each]


async def ask(address: str, access: Access, examples: Sequence[Example]) -> set[str]:
    """Ask all in a closed loop; returns the tasks that answered with a text. Raises PodError if a request failed."""
    answered = set()
    async with AsyncClient(address, access, retry=None) as client:

        async def one(example: Example) -> None:
            answer = await client.generate(example.task_id, example.input, timeout=300)
            if answer.text.strip():
                answered.add(example.task_id)

        try:
            await closed_loop(examples, _IN_FLIGHT, one)
        except ServerError as error:
            raise PodError(str(error)) from None
    return answered


def expect(met: bool, problem: str) -> None:
    """Raise PodError if `met` is false."""
    if not met:
        raise PodError(problem)


# Runs in the container, beside the server: prints what it finds of process 1.
_INSIDE = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/1/status").read().splitlines())
found = {name: status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")}
found["uid"], found["gid"] = (int(status[name].split()[0]) for name in ("Uid", "Gid"))
found["mounts"] = {line.split()[1]: line.split()[3].split(",") for line in open("/proc/1/mounts")}
found["environment"] = dict(each.split("=", 1) for each in open("/proc/1/environ").read().split("\\0") if each)
print(json.dumps(found))
"""
