"""Streams are cancelled at random points; afterwards the engine must hold no sequence and no KV block."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import Any

import grpc
from mtlora_pb.v1 import inference_pb2_grpc

from benchmarks.harness.asking import closed_loop
from mtlora.client import AsyncClient, Client, make_request
from tests.faults._pace import Pace
from tests.faults._secured import what_is_left
from tests.faults._server import shared
from tests.faults.scenario import Options, Row

ORDER = 13
# Three times what runs at once.
_IN_FLIGHT = 48
# Long answers: hardly any stream ends by itself.
_LONG: dict[str, Any] = {"temperature": 2.0, "stop": [], "max_new_tokens": 200, "without_adapter": False, "free": True}


def run(options: Options) -> Row:
    """Cancel 10,000 streams (short: 500), then check what the engine still holds."""
    streams = 10_000 if options.full else 500
    target = shared(options)
    with target.server.client() as client:
        tasks = [task.id for task in client.tasks() if len(task.fields) == 1]
        before = _answers(client, tasks)
        ends = asyncio.run(_cancel(target.address, target.pace, tasks, streams, options.seed))
        # The engine reports statistics only with a step, so make it step.
        after = _answers(client, tasks)
    left = what_is_left(target.server)
    wrong = sum(one != other for one, other in zip(before, after, strict=True))
    met = not left and not wrong and sum(ends.values()) == streams and set(ends) <= {"CANCELLED", "OK"}
    shown = ", ".join(f"{name} {count}" for name, count in sorted(ends.items()))
    remains = ", ".join(f"{name} {value:g}" for name, value in left.items()) or "running 0, waiting 0, KV cache 0"
    return Row(
        "streams cancelled at random points",
        "running count 0, no KV block lost",
        f"{streams} streams ({shown}): {remains}; {wrong} of {len(after)} answers changed",
        met,
    )


def _answers(client: Client, tasks: list[str]) -> list[str]:
    return [client.generate(task_id, "Paris", max_new_tokens=4, free=True).text for task_id in tasks[:5]]


async def _cancel(address: str, pace: Pace, tasks: list[str], streams: int, seed: int) -> Counter[str]:
    """The number of streams by status. The deadline is far longer than an answer takes; it ends hanging streams."""
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    deadline_s = max(600.0, 20 * _LONG["max_new_tokens"] * pace.step_s)

    async with AsyncClient(address, retry=None) as client:
        stub: Any = inference_pb2_grpc.InferenceStub(client._channel)

        async def cancel(number: int) -> None:
            request = make_request(rng.choice(tasks), f"{number} " * rng.randint(1, 60), seed=number, **_LONG)
            call = stub.GenerateStream(request, timeout=deadline_s)
            began = time.monotonic()
            # At once; after a random time; after some messages.
            match rng.randrange(3):
                case 0:
                    await asyncio.sleep(0)
                case 1:
                    await asyncio.sleep(rng.expovariate(1 / (16 * pace.step_s)))
                case _:
                    # The code of a failed stream is counted below. Working sends no messages, for long at times.
                    with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
                        async with asyncio.timeout(32 * pace.step_s):
                            for _ in range(rng.randint(1, 12)):
                                if await call.read() is grpc.aio.EOF:
                                    break
            call.cancel()
            status = (await call.code()).name
            ends[status] += 1
            if status not in ("CANCELLED", "OK"):
                seconds = time.monotonic() - began
                print(f"cancel: stream {number}: {status} {await call.details()} after {seconds:.1f} s")

        await closed_loop(range(streams), _IN_FLIGHT, cancel)
    return ends
