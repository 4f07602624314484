"""`make loadtest`: start a server, find its knee, run closed loops through it and through the engine alone.

A round sends the same requests through the server and through the engine in process, one after the other, so that the
rest of the machine's load affects both alike. The order changes from round to round, and a ratio is the median over
rounds. Each round uses new requests, so neither side has them in its prefix cache.

The ratio of the last line comes from a loop that keeps as many requests under way as there were at the knee on average
(Little's law: load times mean latency). It asks for whole answers, like the engine in process. Two more loops are
reported: streams, in which each token is a message, and a loop with 1.5 times as many requests as a step runs
sequences, which keeps the engine's batch full on both sides, as in `make bench`. With fewer requests, the server's
engine runs one step without a successor for each ended request, because its answer is still on its way to the client;
in process, the next request arrives before that step.
"""

import asyncio
import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb
from pydantic import DirectoryPath, Field

from benchmarks.harness.environment import engine_environment
from benchmarks.harness.native_server import native_server
from benchmarks.harness.worker import WorkerProcess
from loadtest import LoadTestError
from loadtest.cli import FlagSettings, exit_status, in_session
from loadtest.session import Session
from loadtest.settings import CommonSettings, PhaseSettings, RampSettings, Settings
from loadtest.workload import Request
from server.engine.launch import CPU_BLOCK_TOKENS

PROGRAM = "python -m benchmarks.server.loadtest"
# The engine's settings, the same for the server and the engine in process.
_MAX_NUM_SEQS = 64
_ENGINE: dict[str, Any] = {
    "max_num_seqs": _MAX_NUM_SEQS, "max_num_batched_tokens": 2048, "max_model_len": 1024, "dtype": "auto",
    "enable_prefix_caching": True, "enforce_eager": True, "seed": 0,
}  # fmt: skip
_KV_CACHE_GIB = 1.0
_START_TIMEOUT_S = 600.0
# A round has this many requests, or four times those under way if that is more. It has fewer if it would take longer
# than _ROUND_S seconds, but at least twice those under way.
_REQUESTS = 320
_ROUND_S = 20.0
# Requests under way in the closed loop that keeps the engine's batch full.
_FULL = 3 * _MAX_NUM_SEQS // 2


@dataclass(frozen=True)
class Loop:
    """A kind of closed loop. in_flight: requests under way. unary: whole answers, not streams."""

    name: str
    in_flight: int
    unary: bool


class Plan(FlagSettings, RampSettings, CommonSettings, cli_prog_name=PROGRAM):  # type: ignore[misc]
    """Start a server; find its knee, run a closed loop there, compare it with the engine in process."""

    backbone: str = Field("default", description="the server's backbone")
    adapters: DirectoryPath = Field(Path("adapters"), description="folder of adapters NAME/VERSION/")
    rounds: int = Field(5, ge=1, description="of each closed loop against the engine")


def main() -> int:
    """Print progress and, last, a line for programs; return the load test's exit status."""
    return exit_status(PROGRAM, lambda: _start(Plan(_cli_parse_args=True)))


def _start(plan: Plan) -> int:
    print(f"starting a server: backbone {plan.backbone}, adapters {plan.adapters}", flush=True)
    lines: list[str] = []

    async def work(session: Session) -> int:
        status = await _run(session, plan)
        # A run that ended early has no ratio.
        if session.result["in_process"]:
            lines.append(last_line(session.result))
        return status

    with native_server(
        backbone=plan.backbone, adapters=plan.adapters, kv_cache_gib=_KV_CACHE_GIB, log_level="warning",
        timeout=_START_TIMEOUT_S, **_ENGINE,
    ) as server:  # fmt: skip
        common = plan.model_dump(include=set(CommonSettings.model_fields))
        settings = Settings(address=server.address, metrics=server.metrics, **common)
        status = asyncio.run(in_session(settings, [PROGRAM, *sys.argv[1:]], work))
    for line in lines:
        print(line)
    return status


async def _run(session: Session, plan: Plan) -> int:
    """Run every part and fill the session's result; return the exit status."""
    print(f"{session.result['server']['tasks']} tasks served; warming up", flush=True)
    await session.run("warm-up", PhaseSettings(in_flight=16, duration_s=4.0, warm_up_s=1.0))
    knee = await session.find_knee(plan)
    if session.over:
        return session.finish()
    if knee is None:
        raise LoadTestError("no load met the service level, not even the lowest that was tried (--slo-ttft, --slo-e2e)")
    at_knee = max(1, round(knee.offered * knee.mean_e2e))
    print(f"knee: {knee.offered:.1f} requests/s, {at_knee} in flight on average; starting the engine", flush=True)
    loops = (
        Loop("at the knee, whole answers", at_knee, unary=True),
        Loop("at the knee, streams", at_knee, unary=False),
        Loop("engine full, whole answers", _FULL, unary=True),
    )
    await _against_in_process(session, plan, loops, knee.offered)
    if not session.over:
        await session.check()
    return session.finish()


def last_line(result: dict[str, Any]) -> str:
    """The summary for programs."""
    tasks = len({task for phase in result["phases"] for task in phase["tasks"]})
    knee = result["knee"]["offered_per_second"]
    ratio = result["in_process"]["ratio"]
    return (
        f"loadtest: {tasks} tasks, knee {knee:.1f} req/s, failed {result['failed']}, wrong {result['wrong']}, "
        f"end-to-end/in-process {ratio:.2f}"
    )


async def _against_in_process(session: Session, plan: Plan, loops: Sequence[Loop], knee: float) -> None:
    adapters = [(*each.split("/"), str(plan.adapters / each)) for each in session.result["server"]["adapters"]]
    # The server's own default.
    engine_arguments = {**_ENGINE, "block_size": CPU_BLOCK_TOKENS, "disable_log_stats": True}
    engine = WorkerProcess(
        "benchmarks.server.closed_loop_worker",
        {"backbone": plan.backbone, "adapters": adapters, "engine": engine_arguments},
        # Like the server, do not compile: even in eager mode, vLLM compiles some functions during requests.
        engine_environment(_KV_CACHE_GIB) | {"TORCHDYNAMO_DISABLE": "1"},
    )
    rounds = []
    with contextlib.ExitStack() as stack:
        await asyncio.to_thread(stack.enter_context, engine)
        if not session.over:
            # Warm up: the first steps are slow.
            await _ask_engine(engine, session.take(50), loops[0])
        for number in range(plan.rounds):
            for loop in loops:
                if not session.over:
                    rounds.append(await _round(session, engine, number, loop, requests_of_round(loop, knee)))
    ratios = {loop.name: [each["ratio"] for each in rounds if each["loop"] == loop.name] for loop in loops}
    if not all(ratios.values()):
        return
    session.result["in_process"] = {
        "engine": engine_arguments,
        "rounds": rounds,
        "loops": [
            {**asdict(loop), "ratio": statistics.median(found), "ratio_min": min(found), "ratio_max": max(found)}
            for loop, found in zip(loops, ratios.values(), strict=True)
        ],
        "ratio": statistics.median(ratios[loops[0].name]),
    }
    for loop, found in zip(loops, ratios.values(), strict=True):
        print(
            f"end-to-end/in-process, {loop.name}, {loop.in_flight} in flight: "
            f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        )


def requests_of_round(loop: Loop, knee: float) -> int:
    """The number of requests in a round of `loop`, on a machine whose knee is at `knee` requests/s."""
    wanted = max(_REQUESTS, 4 * loop.in_flight)
    return max(2 * loop.in_flight, min(wanted, round(_ROUND_S * knee)))


async def _round(session: Session, engine: WorkerProcess, number: int, loop: Loop, count: int) -> dict[str, Any]:
    requests = session.take(count)
    load = PhaseSettings(in_flight=loop.in_flight, requests=count)
    if number % 2:
        alone = await _ask_engine(engine, requests, loop)
    name = f"closed loop, {loop.name}, round {number + 1}"
    phase = await session.run(name, load, requests, unary=loop.unary)
    if number % 2 == 0:
        alone = await _ask_engine(engine, requests, loop)
    end_to_end, in_process = phase["throughput_per_second"], round(count / alone["seconds"], 4)
    found = {
        "loop": loop.name,
        "requests": count,
        "end_to_end_per_second": end_to_end,
        "in_process_per_second": in_process,
        "ratio": end_to_end / in_process,
        "completion_tokens": {
            "end_to_end": phase["total"]["completion_tokens"], "in_process": alone["completion_tokens"],
        },
    }  # fmt: skip
    print(
        f"round {number + 1}, {loop.name}, {loop.in_flight} in flight: {end_to_end:.2f} requests/s through the server, "
        f"{in_process:.2f} in process, ratio {found['ratio']:.3f}; "
        f"generator {phase['generator']['cores']:.0%} of a core",
        flush=True,
    )
    return found


async def _ask_engine(engine: WorkerProcess, requests: Sequence[Request], loop: Loop) -> dict[str, Any]:
    texts = [(request.task_id, pb.GenerateRequest.FromString(request.message).text) for request in requests]
    return await asyncio.to_thread(engine.ask, {"in_flight": loop.in_flight, "requests": texts})


if __name__ == "__main__":
    raise SystemExit(main())
