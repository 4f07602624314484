"""What a load consists of: arrivals, mixes, traces, tenants, workloads."""

import json
import statistics
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from pydantic import ValidationError

from loadtest import LoadTestError
from loadtest.mix import weights
from loadtest.phase import poisson
from loadtest.settings import PhaseSettings, Range, Settings, Target, WorkloadSettings
from loadtest.tenants import ANONYMOUS, Tenant, read_tenants
from loadtest.trace import parse_trace, read_prompts, read_trace
from loadtest.workload import Request, Workload

NAMES = ["a", "b", "c", "d"]
SERVED = [pb.Task(id="navigate", fields=["input"], stop=["\n"]), pb.Task(id="pair", fields=["first", "second"])]


def test_arrivals_follow_a_poisson_process() -> None:
    times = list(poisson(50, 200, "seed"))
    gaps = [b - a for a, b in pairwise(times)]
    assert len(times) == pytest.approx(50 * 200, rel=0.04)
    # In an exponential distribution, the deviation equals the mean, and a share of 1/e lies beyond the mean.
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert sum(gap > 1 / 50 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)
    assert times == list(poisson(50, 200, "seed")) != list(poisson(50, 200, "other"))
    assert all(0 < time < 200 for time in times)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("uniform", [0.25] * 4),
        ("zipf", [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        ("zipf:0", [0.25] * 4),
        ("hot:c", [1 / 6, 1 / 6, 1 / 2, 1 / 6]),
        ("hot:a=0.7", [0.7, 0.1, 0.1, 0.1]),
    ],
)
def test_mix_gives_the_weights_of_names(mix: str, expected: list[float]) -> None:
    assert weights(mix, NAMES, "task") == pytest.approx(expected)


def test_unknown_name_in_a_mix_gets_near_matches() -> None:
    with pytest.raises(LoadTestError, match=r"no task 'navigat'.*near: navigate"):
        weights("hot:navigat", ["navigate", "sort"], "task")
    with pytest.raises(LoadTestError, match="share of 2"):
        weights("hot:a=2", NAMES, "task")
    with pytest.raises(ValidationError, match=r"task_mix.*\n.*uniform\|zipf"):
        WorkloadSettings(task_mix="pareto")


LINES = st.fixed_dictionaries(
    {"at": st.floats(0, 1e6)},
    optional={
        "task": st.sampled_from(["navigate", "pair"]),
        "tenant": st.text(min_size=1, max_size=5),
        "target": st.text(max_size=5),
        "max_new_tokens": st.integers(1, 100),
    },
)


@given(st.lists(LINES, min_size=1, max_size=10))
def test_reads_every_key_of_a_trace(lines: list[dict[str, object]]) -> None:
    lines.sort(key=lambda line: line["at"])  # type: ignore[arg-type,return-value]
    entries = parse_trace([json.dumps(line) for line in lines], "trace")
    assert [entry.at for entry in entries] == [line["at"] for line in lines]
    for name in ("task", "tenant", "target", "max_new_tokens"):
        assert [getattr(entry, name) for entry in entries] == [line.get(name) for line in lines]


@given(st.text(max_size=40), st.integers(0, 3))
def test_invalid_trace_names_the_line(text: str, before: int) -> None:
    assume(text.strip())
    # A text this short is practically never a valid line.
    with pytest.raises(LoadTestError, match=f"trace: line {before + 1}: "):
        parse_trace([*['{"at": 1}'] * before, text], "trace")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"at": 0.5}', '"at" is 0.5, before the 1'),
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ("{}", "at: Field required"),
        ('{"at": true}', "at: Input should be a valid number"),
        ('{"at": NaN}', "at: Input should be a finite number"),
        ('{"at": 2, "tsk": "x"}', "tsk: Extra inputs are not permitted"),
        ('{"at": 2, "max_new_tokens": 0}', "max_new_tokens: Input should be greater than or equal to 1"),
        ('{"at": 2, "max_new_tokens": true}', "max_new_tokens: Input should be a valid integer"),
        ('{"at": 2, "input": ""}', "input."),
        ('{"at": 2, "input": [{"role": "user"}]}', "input."),
        ('{"at": 2, "input": {"first": "x"}}', "needs a task"),
    ],
)
def test_invalid_trace_names_the_cause(line: str, expected: str) -> None:
    with pytest.raises(LoadTestError) as caught:
        parse_trace(['{"at": 1}', "", line], "trace")
    assert "trace: line 3: " in str(caught.value)
    assert expected in str(caught.value)


def test_trace_begins_at_zero_and_has_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 1700000000.5}\n{"at": 1700000002}\n')
    assert [entry.at for entry in read_trace(path)] == [0, 1.5]
    path.write_text("\n")
    with pytest.raises(LoadTestError, match="needs at least one"):
        read_trace(path)
    with pytest.raises(LoadTestError, match="cannot be read"):
        read_trace(tmp_path / "none")
    path.write_text('{"task": "x"}')
    with pytest.raises(LoadTestError, match="line 1: input: Field required"):
        read_prompts(path)


def test_reads_tenants_and_hides_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "tenants"
    path.write_text("# who\nacme s3cret\n\nbolt 0ther\n")
    assert read_tenants(path) == [Tenant("acme", "s3cret"), Tenant("bolt", "0ther")]
    assert read_tenants(path)[0].metadata == (("authorization", "Bearer s3cret"),)
    assert ANONYMOUS.metadata == ()
    wrongs = (("acme", "line 1: expected NAME KEY"), ("a k\na k", "line 2: tenant 'a'"), ("", "no tenant"))
    for wrong, message in wrongs:
        path.write_text(wrong)
        with pytest.raises(LoadTestError, match=message):
            read_tenants(path)
    path.write_text("acme top secret")
    with pytest.raises(LoadTestError) as caught:
        read_tenants(path)
    assert "secret" not in str(caught.value)


def workload(**settings: object) -> Workload:
    return Workload(WorkloadSettings(**settings), SERVED, [Tenant("acme"), Tenant("bolt")])  # type: ignore[arg-type]


def take(source: Workload, count: int) -> list[Request]:
    return [next(source) for _ in range(count)]


def test_workload_repeats_for_its_seed_and_no_input_before_all_were_asked() -> None:
    first, again, other = workload(), workload(), workload(seed=1)
    requests = take(first, 200)
    assert requests == take(again, 200)
    assert requests != take(other, 200)
    assert len({request.message for request in requests}) == 200
    assert {request.tenant.name for request in requests} == {"acme", "bolt"}
    message = pb.GenerateRequest.FromString(requests[0].message)
    # The server has only this task of the suite.
    assert message.task_id == requests[0].task_id == "navigate"
    assert requests[0].target in ("Yes", "No")
    assert not message.HasField("parameters") or not message.parameters.HasField("max_new_tokens")


def test_random_words_follow_mix_and_lengths() -> None:
    settings = {"prompt_words": Range(4, 6), "new_tokens": Range(2, 3)}
    drawn = take(workload(task_mix="hot:pair=0.8", tenant_mix="hot:acme=0.9", **settings), 1000)
    assert Counter(r.task_id for r in drawn)["pair"] == pytest.approx(800, abs=60)
    assert Counter(r.tenant.name for r in drawn)["acme"] == pytest.approx(900, abs=40)
    messages = [pb.GenerateRequest.FromString(r.message) for r in drawn]
    assert {len(m.text.split()) for m in messages if m.task_id == "navigate"} == {4, 5, 6}
    assert {tuple(sorted(m.fields.values)) for m in messages if m.task_id == "pair"} == {("first", "second")}
    assert {m.parameters.max_new_tokens for m in messages} == {2, 3}
    # The requests turn stop strings off, so the length decides.
    assert all(m.parameters.HasField("stop") and not m.parameters.stop.values for m in messages)
    assert all(r.target is None for r in drawn)


def test_reads_inputs_from_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"task": "pair", "input": {"first": "a", "second": "b"}, "target": "c", "max_new_tokens": 5}\n')
    drawn = next(workload(prompts=path))
    message = pb.GenerateRequest.FromString(drawn.message)
    assert (drawn.task_id, drawn.target, message.parameters.max_new_tokens) == ("pair", "c", 5)
    assert dict(message.fields.values) == {"first": "a", "second": "b"}
    (tmp_path / "suite").mkdir()
    examples = [{"input": f"question {i}", "target": "yes"} for i in range(200)]
    (tmp_path / "suite" / "navigate.json").write_text(json.dumps({"examples": examples}))
    drawn = next(workload(suite=str(tmp_path / "suite")))
    assert (drawn.task_id, drawn.target) == ("navigate", "yes")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("navigat",)}, "no task 'navigat'.*near: navigate"),
        ({"tasks": ("pair",)}, "no input for task 'pair'"),
        ({"suite": "nowhere"}, "suite: found 'nowhere'"),
        ({"tenant_mix": "hot:acne"}, "no tenant 'acne'.*near: acme"),
    ],
)
def test_rejects_impossible_workloads(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        workload(**settings)


def test_rejects_unknown_names_in_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = '{"at": 0, "task": "navigate", "input": "Turn.", "tenant": "bolt"}'
    path.write_text(line + '\n{"at": 1, "task": "navigator"}\n')
    made = workload()
    first, second = read_trace(path)
    request = made.request(first)
    assert (request.tenant.name, pb.GenerateRequest.FromString(request.message).text) == ("bolt", "Turn.")
    with pytest.raises(LoadTestError, match=r"no task 'navigator' \(in the trace\); near: navigate"):
        made.request(second)


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (PhaseSettings, {"rate": 1, "in_flight": 2}, "exactly one of rate"),
        (PhaseSettings, {}, "exactly one of rate"),
        (PhaseSettings, {"rate": 0}, "greater than 0"),
        (PhaseSettings, {"rate": 1, "requests": 3}, "closed loop alone"),
        (Target, {"tls_key": Path("k")}, "both or neither"),
        (Settings, {"check": "never"}, "check\n.*'reply', 'alone' or 'exact'"),
        (WorkloadSettings, {"prompts": Path("p"), "prompt_words": Range(1, 2)}, "one of them"),
    ],
)
def test_rejects_impossible_settings(model: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**values)


@pytest.mark.parametrize(
    ("values", "warm_up_s", "duration_s"),
    [
        ({"rate": 1}, 3, 30),
        ({"in_flight": 1, "duration": 5, "warm_up": 0}, 0, 5),
        ({"in_flight": 1, "requests": 2}, 3, None),
        ({"trace": Path("t")}, 0, None),
        ({"trace": Path("t"), "duration_s": 5, "warm_up_s": 1}, 1, 5),
    ],
)
def test_phase_has_default_times(values: dict[str, Any], warm_up_s: float, duration_s: float | None) -> None:
    load = PhaseSettings(**values)
    assert (load.warm_up_s, load.duration_s) == (warm_up_s, duration_s)


def test_parses_ranges() -> None:
    assert Range.parse("40") == Range(40, 40)
    assert Range.parse("2-5") == Range(2, 5)
    for wrong in ("x", "5-2", "0", "1-", "-3"):
        with pytest.raises(ValueError, match="allowed"):
            Range.parse(wrong)
