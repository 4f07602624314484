"""`mtlora-loadtest all`: a server of its own, its knee, a closed loop at the knee, and the engine without a server.

The closed loop keeps as many requests under way as there were, on average, at the knee (Little's law: load times mean
latency). Rounds of it take turns with the same requests through the engine in process, so that what else the machine
does falls on both alike; their order is swapped from round to round, and the ratio is the median of the rounds' own.
Each round's requests are new to both, so neither finds them in its prefix cache.

The engine in process gives whole answers, so what is held against it are rounds of unary calls. Rounds of streams, each
token a message of its own, are there beside them.
"""

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb

from loadtest.errors import LoadTestError
from loadtest.session import Session
from loadtest.settings import Load, RampSettings, Settings
from loadtest.subprocesses import InProcessEngine, Server
from loadtest.workload import Request

# The engine's settings, given to both in the same words.
_ENGINE = {
    "max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 1024, "dtype": "auto",
    "enable_prefix_caching": True, "enforce_eager": True, "seed": 0,
}  # fmt: skip
_KV_CACHE_GIB = 1.0
CLOSED_LOOP = "closed loop at the knee"


@dataclass(frozen=True)
class Plan:
    """What a whole load test is made of. `rounds` of either kind, of about `round_s` seconds each."""

    backbone: str
    adapters: Path
    ramp: RampSettings
    rounds: int = 5
    round_s: float = 8.0


def server_settings(plan: Plan) -> dict[str, Any]:
    """The settings of the server that is started."""
    return {
        "backbone": plan.backbone, "adapters": plan.adapters, "kv_cache_gib": _KV_CACHE_GIB, "log_level": "warning",
        **_ENGINE,
    }  # fmt: skip


def settings_for(settings: Settings, server: Server) -> Settings:
    """The settings, aimed at a server that was started."""
    target = settings.target.model_copy(update={"address": server.address, "metrics": server.metrics})
    return settings.model_copy(update={"target": target})


async def run(session: Session, plan: Plan) -> int:
    """All of it; the result is in the session. Returns the exit status."""
    view = session.view
    view.line(f"{session.result['server']['tasks']} tasks served; warming up")
    await session.run(Load(name="warm-up", in_flight=16, duration_s=4.0, warm_up_s=1.0))
    knee = await session.find_knee(plan.ramp)
    if session.over:
        return session.finish()
    if knee is None:
        raise LoadTestError(
            "no load holds the service level, not even the lowest that was tried (--slo-ttft, --slo-e2e)"
        )
    in_flight = max(1, round(knee.offered * knee.mean_e2e))
    view.line(f"knee: {knee.offered:.1f} requests/s, {in_flight} in flight on average; starting the engine in process")
    await _against_in_process(session, plan, in_flight, max(in_flight * 4, round(knee.offered * plan.round_s)))
    if not session.over:
        await session.check()
    return session.finish()


def last_line(result: dict[str, Any]) -> str:
    """What the whole came to, in a line for programs."""
    tasks = len({task for phase in result["phases"] for task in phase["tasks"]})
    knee = result["knee"]["offered_per_second"]
    ratio = result["in_process"]["ratio"]
    return (
        f"loadtest: {tasks} tasks, knee {knee:.1f} req/s, failed {result['failed']}, wrong {result['wrong']}, "
        f"end-to-end/in-process {ratio:.2f}"
    )


async def _against_in_process(session: Session, plan: Plan, in_flight: int, count: int) -> None:
    adapters = [_adapter(plan.adapters, name) for name in session.result["server"]["adapters"]]
    engine_arguments = {**_ENGINE, "disable_log_stats": True}
    engine = InProcessEngine(plan.backbone, adapters, engine_arguments, _KV_CACHE_GIB)
    await asyncio.to_thread(engine.__enter__)
    try:
        # Its first steps are slow, as the server's were.
        await asyncio.to_thread(engine.run, _texts(session.generators.workload.take(50)), in_flight)
        rounds = []
        for number in range(plan.rounds):
            for unary in (True, False):
                if not session.over:
                    rounds.append(await _round(session, engine, number, in_flight, count, unary))
    finally:
        await asyncio.to_thread(engine.__exit__)
    whole, streamed = ([each["ratio"] for each in rounds if each["unary"] is unary] for unary in (True, False))
    if not streamed:
        return
    session.result["in_process"] = {
        "in_flight": in_flight,
        "engine": engine_arguments,
        "rounds": rounds,
        "ratio": statistics.median(whole),
        "ratio_min": min(whole),
        "ratio_max": max(whole),
        "streamed_ratio": statistics.median(streamed),
        "streamed_ratio_min": min(streamed),
        "streamed_ratio_max": max(streamed),
    }


async def _round(
    session: Session, engine: InProcessEngine, number: int, in_flight: int, count: int, unary: bool
) -> dict[str, Any]:
    requests = session.generators.workload.take(count)
    kind = "whole answers" if unary else "streams"

    async def through_the_server() -> dict[str, Any]:
        name = f"{CLOSED_LOOP}, {kind}, round {number + 1}"
        load = Load(name=name, in_flight=in_flight, requests=count, unary=unary)
        return await session.run(load, requests)

    if number % 2 == 0:
        phase = await through_the_server()
        alone = await asyncio.to_thread(engine.run, _texts(requests), in_flight)
    else:
        alone = await asyncio.to_thread(engine.run, _texts(requests), in_flight)
        phase = await through_the_server()
    end_to_end, in_process = phase["throughput_per_second"], round(count / alone.seconds, 4)
    found = {
        "unary": unary,
        "requests": count,
        "end_to_end_per_second": end_to_end,
        "in_process_per_second": in_process,
        "ratio": end_to_end / in_process,
        "completion_tokens": {
            "end_to_end": phase["total"]["completion_tokens"], "in_process": alone.completion_tokens,
        },
    }  # fmt: skip
    session.view.line(
        f"round {number + 1}, {kind}, {in_flight} in flight: {end_to_end:.2f} requests/s through the server, "
        f"{in_process:.2f} in process, ratio {found['ratio']:.3f}; "
        f"generator {phase['generator']['cores']:.0%} of a core"
    )
    return found


def _texts(requests: Sequence[Request]) -> list[tuple[str, str]]:
    return [(request.task_id, pb.GenerateRequest.FromString(request.message).text) for request in requests]


def _adapter(folder: Path, served: str) -> tuple[str, str, Path]:
    name, _, version = served.partition("/")
    return name, version, folder / name / version
