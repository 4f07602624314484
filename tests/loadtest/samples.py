"""Recorded phases and results made without a server."""

import random
from typing import Any

from loadtest import result
from loadtest.phase import Ran
from loadtest.recorder import Outcome, Recorder
from loadtest.session import step_of
from loadtest.settings import Objective, PhaseSettings, Settings
from loadtest.tenants import Tenant
from loadtest.workload import Request

OBJECTIVE = Objective(ttft_s=0.5, e2e_s=1.0)


def request(task: str = "sort", tenant: str = "acme", target: str | None = None) -> Request:
    return Request(task, Tenant(tenant), b"message", target)


def outcome(intended: float, e2e: float, **fields: Any) -> Outcome:
    """An answer of three tokens; the first comes after a quarter of the time."""
    asked = fields.pop("request", request())
    values: dict[str, Any] = {
        "sent": intended, "ended": intended + e2e, "first": intended + e2e / 4, "gaps": [e2e / 4, e2e / 2],
        "text": "x", "prompt_tokens": 10, "completion_tokens": 3,
    }  # fmt: skip
    return Outcome(asked, intended, **(values | fields))


def recorder(window: tuple[float, float] = (1.0, 11.0)) -> Recorder:
    return Recorder(window, OBJECTIVE, ["sort", "count"], ["acme", "bolt"])


def record(into: Recorder, *outcomes: Outcome) -> Recorder:
    for each in outcomes:
        into.start(each.request, each.intended, each.sent)
        into.end(each)
    return into


def phase(rate: float, latency: float, *, name: str | None = None, seed: int = 0, seconds: int = 20) -> dict[str, Any]:
    """A phase against a system that answers after about `latency` seconds."""
    rng = random.Random(seed)
    filled = recorder((0.0, float(seconds)))
    now = rng.expovariate(rate)
    while now < seconds:
        asked = request(rng.choice(("sort", "count", "rare")), rng.choice(("acme", "bolt")), "x")
        record(filled, outcome(now, latency * rng.lognormvariate(0, 0.2), request=asked))
        now += rng.expovariate(rate)
    load = PhaseSettings(rate=rate, duration_s=seconds, warm_up_s=0)
    ran = Ran(filled, cpu_s=0.5, wall_s=float(seconds), gone=False, stopped=False)
    phase_name = name or f"{rate:g} requests/s"
    return result.phase_json(phase_name, load, ran, None) | {"tolerated": False, "failed": 0, "began_s": 0.0}


def a_result(*phases: dict[str, Any]) -> dict[str, Any]:
    settings = Settings(ttft_s=OBJECTIVE.ttft_s, e2e_s=OBJECTIVE.e2e_s).to_json()
    server = {"address": "127.0.0.1:1", "build": {"version": "0"}, "tasks": 2, "adapters": ["a/1"]}
    return result.document(["mtlora-loadtest"], settings, server) | {"phases": list(phases), "complete": True}


def with_knee(made: dict[str, Any]) -> dict[str, Any]:
    """The result of a search for the knee; the last phase but one is the knee."""
    steps = [step_of(each, OBJECTIVE) for each in made["phases"]]
    made["knee"] = {
        "phase": made["phases"][-2]["name"], "offered_per_second": steps[-2].offered, "bounded": True,
        "steps": [{**vars(step), "breaches": step.breaches(OBJECTIVE)} for step in steps],
    }  # fmt: skip
    return made
