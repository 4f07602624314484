"""`make bench-front`: what is measured, and the last line."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.server.front import IN_FLIGHT, Ask, Measured, Side, measure, report
from mtlora.suite.base import Example


def test_measure_does_not_count_the_first_requests() -> None:
    asked: list[str] = []
    running = most = 0

    @asynccontextmanager
    async def connect() -> AsyncIterator[Ask]:
        async def ask(example: Example) -> int:
            nonlocal running, most
            asked.append(example.input)
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.02)
            running -= 1
            return 3

        yield ask

    examples = [Example("task", str(number), "") for number in range(3 * IN_FLIGHT)]
    measured = asyncio.run(measure(Side("this", os.getpid(), connect), examples))
    assert asked == [example.input for example in examples]
    assert most == IN_FLIGHT
    assert running == 0
    assert measured.requests == 2 * IN_FLIGHT
    assert measured.tokens == 3 * measured.requests
    assert 0.04 <= measured.seconds < 1
    assert 0 <= measured.asker_s <= measured.seconds


def test_last_line_holds_geometric_means_of_the_ratios_of_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [Measured(10, 100, 500, 0.4, 1), Measured(10, 50, 250, 0.4, 1), Measured(10, 80, 400, 0.4, 1)]
    theirs = [Measured(10, 80, 400, 0.4, 1), Measured(10, 50, 250, 0.5, 1), Measured(10, 80, 400, 0.2, 1)]
    report({"mtlora-server": ours, "vllm serve": theirs})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "bench-front: cost/vllm-serve 1.09, throughput/vllm-serve 1.08"
    assert any("mtlora-server" in line and "8.00" in line and "5.00" in line for line in lines)
