"""The order of the fault scenarios, their fairness index and their fuzzer."""

import itertools

import pytest
from mtlora_pb.v1.inference_pb2 import Summary

from mtlora.client import OPEN
from tests.faults.__main__ import scenarios, shared_servers
from tests.faults._load import Question
from tests.faults.flood import jain
from tests.faults.fuzz import METHODS, Fuzzer
from tests.faults.usage import Asking


def test_jains_index_of_equal_and_unequal_shares() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_fuzzer_repeats_its_requests_for_a_seed_and_calls_every_method() -> None:
    def made(seed: int) -> list[tuple[str, object, bytes]]:
        fuzzer = Fuzzer(seed, "mtk_00000000_secret", ["one"])
        return [fuzzer.request() for _ in range(300)]

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert {method for method, _, _ in made(1)} == set(METHODS)
    assert any(b"one" in data for _, _, data in made(1))


def test_scenarios_that_share_a_server_are_neighbours() -> None:
    # Else the server would be started anew, or stay beside others that are measured.
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
    asking.summaries = [Summary(prompt_tokens=10, cached_tokens=2, completion_tokens=3) for _ in range(2)]
    assert (asking.wrong(counted) == "") is right
