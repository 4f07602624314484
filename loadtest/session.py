"""A run from start to end: connect, run phases, check answers, keep the result, judge it."""

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from loadtest import check, result, server_metrics
from loadtest.connection import Connection
from loadtest.errors import LoadTestError
from loadtest.histogram import Latency
from loadtest.knee import KneeSearch, Step
from loadtest.live import View
from loadtest.phase import Ran, Share
from loadtest.processes import Generators, start
from loadtest.recorder import Answer
from loadtest.server_metrics import Page, Scraper, Watched
from loadtest.settings import Load, Objective, RampSettings, Settings
from loadtest.tenants import ANONYMOUS, Tenant, read_tenants
from loadtest.workload import Request, TaskInfo, task_info

OK, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


class Session:
    """What is shared by the phases of one run. `result` is kept up to date, so that a run cut short keeps its part."""

    def __init__(
        self,
        settings: Settings,
        view: View,
        generators: Generators,
        tasks: list[TaskInfo],
        tenants: list[Tenant],
        scraper: Scraper | None,
        document: dict[str, Any],
    ) -> None:
        self.settings = settings
        self.view = view
        self.result = document
        self.interrupted = False
        self.gone = False
        self.generators = generators
        self._tasks = {task.id: task for task in tasks}
        self._tenants = tenants
        self._scraper = scraper
        self._answers: Counter[Answer] = Counter()
        self._exact = 0
        self._began = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether there is no point in another phase."""
        return self.interrupted or self.gone

    def interrupt(self) -> None:
        """End what runs, keeping what it has."""
        self.interrupted = True
        self.generators.stop()

    async def run(self, load: Load, requests: list[Request] | None = None, *, probe: bool = False) -> dict[str, Any]:
        """Run a phase and add it to the result. A `probe` looks for the knee: beyond it, refusals are no failures."""
        watched = Watched()
        began = time.monotonic()
        watching = before = None
        if self._scraper is not None:
            before = await self._page(watched)
            watching = asyncio.create_task(self._scraper.watch(watched))
        try:
            with self.view.phase(load.name):
                ran = await self.generators.run(load, self.view.progress, requests)
        finally:
            if watching is not None:
                watching.cancel()
        self.gone = self.gone or ran.gone
        server = await self._server(load, ran, watched, began, before)
        self._answers.update(ran.recorder.answers)
        self._exact += ran.recorder.everything.exact
        phase = result.phase_json(load, ran, server)
        tolerated = probe and bool(step_of(phase, self.settings.objective).breaches(self.settings.objective))
        phase |= {"tolerated": tolerated, "failed": result.failed(ran.recorder.everything, tolerated=tolerated)}
        phase["began_s"] = round(began - self._began, 2)
        self.result["phases"].append(phase)
        self.result["failed"] = sum(each["failed"] for each in self.result["phases"])
        return phase

    async def find_knee(self, ramp: RampSettings) -> Step | None:
        """Look for the knee, a printed line a step; adds it to the result."""
        search = KneeSearch(ramp, self.settings.objective)
        while not self.over and (rate := search.next_rate()) is not None:
            load = Load(name=f"{rate:.3g} requests/s", rate=rate, duration_s=ramp.step_s, warm_up_s=ramp.warm_up_s)
            phase = await self.run(load, probe=True)
            if not phase["complete"]:
                break
            step = step_of(phase, self.settings.objective)
            search.add(step)
            self.view.line(step_line(step, step.breaches(self.settings.objective), phase))
        knee = search.knee
        self.result["knee"] = {
            "settings": ramp.model_dump(mode="json"),
            "phase": next((p["name"] for p in self.result["phases"] if knee and _rate(p) == knee.rate), None),
            "offered_per_second": knee.offered if knee else None,
            "goodput_per_second": knee.goodput if knee else None,
            "mean_in_flight": round(knee.offered * knee.mean_e2e, 3) if knee else None,
            "bounded": search.bounded,
            "steps": [{**vars(step), "breaches": step.breaches(self.settings.objective)} for step in search.steps],
        }
        return knee

    async def check(self) -> None:
        """Check the answers of all phases as the settings say; adds what was found to the result."""
        how = self.settings.check
        if how == "reply" or self.gone:
            return
        if how == "exact":
            checked = check.against_targets(self._answers)
        else:
            # On this process's own connection, whoever sent the load.
            async with Connection(self.settings.target) as connection:
                checked = await check.ask_again(
                    connection, self._tenants[0], self._answers, self._tasks, tie_nats=self.settings.tie_nats,
                    timeout_s=self.settings.target.timeout_s, progress=self.view.asking_again,
                    stopped=lambda: self.interrupted,
                )  # fmt: skip
        checked.exact = self._exact
        self.result["check"] = {"how": how, **checked.to_json()}
        self.result["wrong"] = checked.wrong
        for example in checked.examples[:5]:
            self.view.line(f"wrong: {example['task']}: {example['answer']!r}, alone {example['alone']!r}")

    def finish(self) -> int:
        """Judge the run; returns the exit status."""
        self.result["complete"] = not self.over
        self.result["server_gone"] = self.gone
        if self.interrupted:
            return INTERRUPTED
        return FAILED if self.gone or self.result["failed"] or self.result["wrong"] else OK

    async def _page(self, watched: Watched) -> Page | None:
        """A reading of the server's metrics, kept; None where it has gone."""
        assert self._scraper is not None
        with contextlib.suppress(LoadTestError):
            watched.pages.append(await self._scraper.read())
            return watched.pages[-1]
        return None

    async def _server(
        self, load: Load, ran: Ran, watched: Watched, began: float, before: Page | None
    ) -> dict[str, Any] | None:
        if self._scraper is None:
            return None
        after = await self._page(watched)
        everything = ran.recorder.everything
        recorded = {"ttft": everything.ttft, "itl": everything.itl, "e2e": everything.e2e}
        # Of a unary answer the generator sees no first token of its own.
        if self.settings.target.unary or load.unary:
            recorded = {"e2e": everything.e2e}
        return {
            **server_metrics.series(watched, began),
            "agreement": server_metrics.compare(before, after, recorded) if before and after else {},
            "loop_delay": server_metrics.loop_delay(before, after) if before and after else None,
        }


@asynccontextmanager
async def open_session(settings: Settings, command: list[str], view: View) -> AsyncIterator[Session]:
    """Connect, ask which tasks there are, start the generators. Raises LoadTestError where any of it cannot be done."""
    tenants = read_tenants(settings.target.tenants) if settings.target.tenants else [ANONYMOUS]
    scraper = Scraper(settings.target.metrics) if settings.target.metrics else None
    async with Connection(settings.target) as connection:
        await connection.wait_connected()
        served = await connection.tasks(tenants[0].metadata)
    page = await scraper.read() if scraper else None
    tasks = [task_info(task) for task in served]
    share = Share(settings, tuple(tasks), tuple(tenants))
    generators = await asyncio.to_thread(start, share)
    server = {
        "address": settings.target.address,
        "build": dict(page.build) if page else None,
        "tasks": len(served),
        "adapters": sorted({f"{task.adapter_name}/{task.adapter_version}" for task in served}),
    }
    described = settings.model_dump(mode="json", exclude_none=True) | {"tenants": [tenant.name for tenant in tenants]}
    document = result.document(command, described, server)
    session = Session(settings, view, generators, tasks, tenants, scraper, document)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, session.interrupt)
    try:
        yield session
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        await generators.close()


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
    """One line for people."""
    verdict = "holds" if not breaches else "does not hold: " + "; ".join(breaches)
    return (
        f"{step.rate:7.2f} requests/s: offered {step.offered:.2f}, answered {step.throughput:.2f}, "
        f"good {step.goodput:.2f}; TTFT p95 {phase['total']['ttft']['p95']:.2f} s, "
        f"E2E p95 {phase['total']['e2e']['p95']:.2f} s; "
        f"generator {phase['generator']['cores']:.0%} of a core; {verdict}"
    )


def _rate(phase: Mapping[str, Any]) -> float | None:
    return phase["load"].get("rate") if phase["kind"] == "open" else None
