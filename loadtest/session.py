"""A run from start to end: connect, run phases, check answers, fill the result, judge it."""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb

from loadtest import check, result, server_metrics
from loadtest.connection import Connection
from loadtest.histogram import Latency
from loadtest.knee import KneeSearch, Step
from loadtest.phase import Generator
from loadtest.recorder import Answer
from loadtest.server_metrics import Watch
from loadtest.settings import Objective, PhaseSettings, RampSettings, Settings
from loadtest.tenants import ANONYMOUS, Tenant, read_tenants
from loadtest.workload import Request

OK, FAILED, INTERRUPTED = 0, 1, 130


class Session:
    """The phases of one run and their result. `result` is always up to date, so an interrupted run keeps its part."""

    def __init__(
        self,
        settings: Settings,
        connection: Connection,
        tasks: Sequence[pb.Task],
        tenants: Sequence[Tenant],
        document: dict[str, Any],
    ) -> None:
        self.result = document
        self.interrupted = False
        self.gone = False
        self._settings = settings
        self._connection = connection
        self._generator = Generator(settings, connection, tasks, tenants)
        self._tasks = {task.id: task for task in tasks}
        self._tenants = tenants
        self._answers: Counter[Answer] = Counter()
        self._exact = 0
        self._began = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether no further phase should run."""
        return self.interrupted or self.gone

    def interrupt(self) -> None:
        """End the running phase and keep its part."""
        self.interrupted = True
        self._generator.stop()

    def take(self, count: int) -> list[Request]:
        """Take the workload's next requests."""
        return [next(self._generator.workload) for _ in range(count)]

    async def run(
        self,
        name: str,
        load: PhaseSettings,
        requests: Sequence[Request] | None = None,
        *,
        unary: bool = False,
        probe: bool = False,
    ) -> dict[str, Any]:
        """Run a phase and add it to the result.

        `requests` replace drawn ones. `unary` overrides the settings and asks for whole answers. A `probe` is a step of
        the search for the knee: beyond the knee, refusals are no failures.
        """
        began = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            metrics = self._settings.metrics
            watch = await stack.enter_async_context(Watch(metrics)) if metrics else None
            ran = await self._generator.run(name, load, requests, unary=unary)
        self.gone = self.gone or ran.gone
        everything = ran.recorder.everything
        recorded = {"e2e": everything.e2e}
        # The generator does not see the first token of a unary answer.
        if not (unary or self._settings.unary):
            recorded |= {"ttft": everything.ttft, "itl": everything.itl}
        server = watch.to_json(began, recorded) if watch else None
        self._answers.update(ran.recorder.answers)
        self._exact += everything.exact
        phase = result.phase_json(name, load, ran, server)
        tolerated = probe and bool(step_of(phase, self._settings).breaches(self._settings))
        phase |= {"tolerated": tolerated, "failed": result.failed(everything, tolerated=tolerated)}
        phase["began_s"] = round(began - self._began, 2)
        self.result["phases"].append(phase)
        self.result["failed"] = sum(each["failed"] for each in self.result["phases"])
        return phase

    async def find_knee(self, ramp: RampSettings) -> Step | None:
        """Search for the knee, print a line per step, add the knee to the result."""
        search = KneeSearch(ramp, self._settings)
        while not self.over and (rate := search.next_rate()) is not None:
            load = PhaseSettings(rate=rate, duration_s=ramp.step_s, warm_up_s=ramp.warm_up_s)
            phase = await self.run(f"{rate:.3g} requests/s", load, probe=True)
            if not phase["complete"]:
                break
            step = step_of(phase, self._settings)
            search.add(step)
            print(step_line(step, step.breaches(self._settings), phase), flush=True)
        knee = search.knee
        self.result["knee"] = {
            "settings": ramp.model_dump(mode="json", include=set(RampSettings.model_fields)),
            "phase": next((p["name"] for p in self.result["phases"] if knee and _rate(p) == knee.rate), None),
            "offered_per_second": knee.offered if knee else None,
            "goodput_per_second": knee.goodput if knee else None,
            "mean_in_flight": round(knee.offered * knee.mean_e2e, 3) if knee else None,
            "bounded": search.bounded,
            "steps": [{**vars(step), "breaches": step.breaches(self._settings)} for step in search.steps],
        }
        return knee

    async def check(self) -> None:
        """Check the answers of all phases according to the settings; add the findings to the result."""
        how = self._settings.check
        if how == "reply" or self.gone:
            return
        if how == "exact":
            checked = check.against_targets(self._answers)
        else:
            checked = await check.ask_again(
                self._connection, self._tenants[0], self._answers, self._tasks, tie_nats=self._settings.tie_nats,
                timeout_s=self._settings.timeout_s, stopped=lambda: self.interrupted,
            )  # fmt: skip
        checked.exact = self._exact
        self.result["check"] = {"how": how, **checked.to_json()}
        self.result["wrong"] = checked.wrong
        if self._unchecked:
            total = self._answers.total()
            print(f"not checked: {self._unchecked} of {total} answers that were to be asked again alone")
        for example in checked.examples[:5]:
            apart = "" if example["nats"] is None else f", {example['nats']} nats apart where they differ"
            print(f"wrong: {example['task']}: {example['answer']!r}, alone {example['alone']!r}{apart}")

    @property
    def _unchecked(self) -> int:
        """Number of answers that should have been checked again, but could not be."""
        made = self.result["check"]
        return made["unchecked"] if made and made["how"] == "alone" else 0

    def finish(self) -> int:
        """Judge the run; return the exit status."""
        self.result["complete"] = not self.over
        self.result["server_gone"] = self.gone
        if self.interrupted:
            return INTERRUPTED
        found = self.gone or self.result["failed"] or self.result["wrong"] or self._unchecked
        return FAILED if found else OK


@asynccontextmanager
async def open_session(settings: Settings, command: list[str]) -> AsyncIterator[Session]:
    """Connect, list the tasks, set up the workload. Raises LoadTestError if any of it fails."""
    tenants = read_tenants(settings.tenants) if settings.tenants else [ANONYMOUS]
    async with Connection(settings) as connection:
        await connection.wait_connected()
        served = await connection.tasks(tenants[0].metadata)
        page = await server_metrics.fetch(settings.metrics) if settings.metrics else None
        server = {
            "address": settings.address,
            "build": dict(page.labels(server_metrics.BUILD)) if page else None,
            "tasks": len(served),
            "adapters": sorted({f"{task.adapter_name}/{task.adapter_version}" for task in served}),
        }
        described = settings.to_json() | {"tenants": [tenant.name for tenant in tenants]}
        document = result.document(command, described, server)
        session = Session(settings, connection, served, tenants, document)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, session.interrupt)
        try:
            yield session
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)


def step_of(phase: Mapping[str, Any], objective: Objective) -> Step:
    """A phase of a result as a step of the search."""
    total = phase["total"]
    return Step(
        rate=_rate(phase) or 0.0,
        offered=phase["offered_per_second"],
        throughput=phase["throughput_per_second"],
        goodput=phase["goodput_per_second"],
        ttft=Latency.decode(total["ttft"]["hdr"]).quantile(objective.quantile),
        e2e=Latency.decode(total["e2e"]["hdr"]).quantile(objective.quantile),
        mean_e2e=total["e2e"]["mean"],
    )


def step_line(step: Step, breaches: list[str], phase: Mapping[str, Any]) -> str:
    """One line for a reader."""
    verdict = "holds" if not breaches else "does not hold: " + "; ".join(breaches)
    return (
        f"{step.rate:7.2f} requests/s: offered {step.offered:.2f}, answered {step.throughput:.2f}, "
        f"good {step.goodput:.2f}; TTFT p95 {phase['total']['ttft']['p95']:.2f} s, "
        f"E2E p95 {phase['total']['e2e']['p95']:.2f} s; "
        f"generator {phase['generator']['cores']:.0%} of a core; {verdict}"
    )


def _rate(phase: Mapping[str, Any]) -> float | None:
    return phase["load"].get("rate") if phase["kind"] == "open" else None
