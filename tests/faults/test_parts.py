"""The order of the fault scenarios, and what they count."""

import asyncio
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from mtlora.client import OPEN
from tests.faults.__main__ import scenarios, shared_servers
from tests.faults._load import Question
from tests.faults.fuzz import METHODS, PROPER, Fuzzer, send
from tests.faults.hostile_types import NEIGHBOURS_TYPE, Hostility
from tests.faults.many_tasks import bound_of
from tests.faults.usage import Asking
from tests.servicers import serving_here


@pytest.mark.slow
def test_fuzzer_repeats_its_requests_for_a_seed_and_calls_every_method() -> None:
    def made(seed: int) -> list[tuple[str, object, bytes]]:
        fuzzer = Fuzzer(seed, "mtk_00000000_secret", ["one"])
        return [fuzzer.request() for _ in range(300)]

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert {method for method, _, _ in made(1)} == set(METHODS)
    assert any(b"one" in data for _, _, data in made(1))


class HangingServer(inference_pb2_grpc.InferenceServicer):
    """Answers at once, but for one kind of type and for the neighbour."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        if request.answer.WhichOneof("type") == "grammar":
            await asyncio.sleep(60)
        if request.answer.regex.startswith(NEIGHBOURS_TYPE):
            await asyncio.sleep(0.1)
        return pb.GenerateResponse(text="x")


@pytest.mark.slow
async def test_types_that_never_get_an_answer_are_counted() -> None:
    access = {"hostile": OPEN, "neighbour": OPEN}
    async with serving_here(HangingServer(), inference_pb2_grpc.add_InferenceServicer_to_server) as (address, _):
        hostility = Hostility(address, access, [Question("one", "x")] * 3, 0, patience_s=1.0)
        await hostility.rounds(2)
    assert hostility.statuses["DEADLINE_EXCEEDED"] >= 2
    assert hostility.statuses["OK"] > hostility.statuses["DEADLINE_EXCEEDED"]
    assert hostility.failed == 0
    assert len(hostility.alone) == len(hostility.beside) == 6


async def test_a_request_that_hangs_gets_no_proper_status() -> None:
    class Hangs(inference_pb2_grpc.InferenceServicer):
        async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
            await asyncio.sleep(60)
            raise AssertionError

    async with serving_here(Hangs(), inference_pb2_grpc.add_InferenceServicer_to_server) as (address, _):
        statuses = await send(address, Fuzzer(0, "mtk_00000000_secret", ["one"]), 60, patience_s=0.5)
    assert set(statuses) - PROPER == {"DEADLINE_EXCEEDED"} | set(statuses) & {"INTERNAL", "UNKNOWN"}


def test_a_long_stall_of_the_loop_is_seen_though_it_is_one_sample() -> None:
    healthy = {0.01: 2990.0, 0.05: 3000.0, 0.5: 3000.0, math.inf: 3000.0}
    stalled = healthy | {0.05: 2999.0, 0.5: 2999.0}
    for counts, slowest in ((healthy, 0.05), (stalled, math.inf)):
        assert bound_of(counts, 0.999) == 0.05
        assert bound_of(counts, 1.0) == slowest


def test_measurements_read_metrics_that_exist() -> None:
    # A page gives 0 for a metric that it lacks.
    root = Path(__file__).parents[2]
    known = set(re.findall(r"`(mtlora_\w+)`", (root / "docs/reference/metrics.md").read_text()))
    read = {
        re.sub("_(total|count|sum|bucket|per_second)$", "", name)
        for folder in ("tests/faults", "tests/fleet", "tests/observe", "benchmarks", "loadtest", "deploy/pod")
        for file in (root / folder).rglob("*.py")
        for name in re.findall(r'"(mtlora_[a-z_]+)"', file.read_text())
    }
    assert "mtlora_tenants_reload_failures" in read
    assert read <= known


def test_scenarios_that_share_a_server_are_neighbours() -> None:
    # Otherwise the server would start again, or run beside others that are measured.
    order = [frozenset(map(id, shared_servers(run))) for run in scenarios().values()]
    groups = [servers for servers, _ in itertools.groupby(order) if servers]
    assert len(groups) == len(set(groups))


@pytest.mark.parametrize(
    ("counted", "right"),
    [
        ((2, 20, 4, 6), True),
        # The call that a kill left unanswered.
        ((3, 30, 4, 7), True),
        ((3, 30, 4, 6 + 17), False),
        ((3, 31, 4, 7), False),
        ((4, 40, 4, 8), False),
        ((1, 10, 2, 3), False),
        ((2, 20, 4, 5), False),
        ((2, 20, 5, 6), False),
        ((0, 0, 0, 0), False),
    ],
)
def test_sums_of_usage_are_compared_with_summaries(counted: tuple[int, ...], right: bool) -> None:
    asking = Asking(OPEN, Question("one", "x"), unanswered=1)
    asking.summaries = [pb.Summary(prompt_tokens=10, cached_tokens=2, completion_tokens=3) for _ in range(2)]
    assert (asking.wrong(counted) == "") is right
