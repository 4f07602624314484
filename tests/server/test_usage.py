"""Usage: exact over kills, torn files, clocks that go back; budgets; and the RPC and the command that read it."""

import asyncio
import errno
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb
from openinference_pb import grpc_predict_v2_pb2 as oi
from openinference_pb import grpc_predict_v2_pb2_grpc

from mtlora.client import Client, ServerError
from server.accounting import Usage, UsageCounts, UsageError
from server.accounting.journal import Journal, Record, parse
from server.cli import main
from server.job import Delta
from server.rpc import encoding
from server.rpc.generation import Generation
from server.telemetry.metrics import Metrics
from server.tenants import Tenant
from tests.server.fakes import Service, usage_rows
from tests.server.front import Clock
from tests.waiting import eventually

NOON = int(datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp())
DAY = 86400
ALWAYS = (0, 2**40)
ids = st.from_regex(r"[a-z0-9_.\-]{1,20}", fullmatch=True)
records = st.builds(
    Record, st.integers(0, 2**33), ids, ids, st.builds(UsageCounts, *(st.integers(0, 2**40) for _ in range(4)))
)


@given(st.lists(records, max_size=8), st.data())
def test_a_file_torn_at_any_byte_gives_every_whole_record(written: list[Record], data: st.DataObject) -> None:
    lines = [each.line() for each in written]
    cut = data.draw(st.integers(0, len(b"".join(lines))))
    whole = sum(len(b"".join(lines[: n + 1])) <= cut for n in range(len(lines)))
    journal = Journal(None, 1)
    os.write(journal._file, b"".join(lines)[:cut])
    first = journal.read(1, 0)
    assert list(parse(first)) == written[:whole]
    # The rest of the torn line comes with the next read.
    os.write(journal._file, b"".join(lines)[cut:])
    assert list(parse(journal.read(1, len(first)))) == written[whole:]


def test_damaged_lines_are_passed_over() -> None:
    good = Record(1, "a", "one", UsageCounts(1, 2, 3, 4))
    for damage in (b"\0" * 100, b"\xff", b"1 a one 1 2 3", b"1 a one 1 2 3 4 5", b"x a one 1 2 3 4", b""):
        assert list(parse(good.line() + damage + b"\n" + good.line())) == [good, good]


def test_what_a_full_disk_refuses_is_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(None, 1)
    lines = [Record(n, "a", "one", UsageCounts(1)).line() for n in range(4)]
    write = os.write
    for line, taken in ((lines[0], 5), (lines[1], 0)):
        monkeypatch.setattr(os, "write", lambda file, data, taken=taken: write(file, data[:taken]))
        with pytest.raises(OSError, match="bytes were written"):
            journal.append(line)
    monkeypatch.setattr(os, "write", write)
    journal.append(lines[2])
    journal.append(lines[3])
    assert journal.read(1, 0) == b"".join(lines)
    assert not journal.unwritten


async def test_every_record_counts_once_across_restarts_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers are killed at every stage of summing up, with a new file for every few records."""
    monkeypatch.setattr("server.accounting.journal.SEGMENT_BYTES", 100)
    recorded = 0
    for summing_up in range(8):
        usage = Usage(tmp_path, Metrics(), Clock(NOON))
        for number in range(10):
            usage.record("a", "one", UsageCounts(1, 10, 5, 2))
            recorded += 1
            if number == summing_up:
                await usage._in_thread(usage._totals.sum_up, usage._journal)
        assert await usage_rows(usage) == [
            (0, "a", "one", UsageCounts(recorded, 10 * recorded, 5 * recorded, 2 * recorded))
        ]
        if summing_up % 2:
            usage.record("a", "one", UsageCounts(1, 10, 5, 2))
            recorded += 1
        # No `close`, as after a kill; but this process must not keep the database open.
        await usage._in_thread(usage._totals.close)
    # Files that are summed up are gone.
    assert len(list(tmp_path.glob("journal-*"))) <= 2


async def test_a_failure_while_summing_up_counts_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = Usage(tmp_path, Metrics(), Clock(NOON))
    usage.record("a", "one", UsageCounts(1, 2, 0, 3))
    with monkeypatch.context() as patch:
        patch.setattr("server.accounting.totals._ADD_SPENT", "INSERT INTO nowhere VALUES (?, ?, ?, ?)")
        with pytest.raises(Exception, match="nowhere"):
            await usage_rows(usage)
    assert await usage_rows(usage) == [(0, "a", "one", UsageCounts(1, 2, 0, 3))]


KILLED = """
import os, signal, sys
from pathlib import Path
from server.accounting import UsageCounts, Usage
from server.telemetry.metrics import Metrics
usage = Usage(Path(sys.argv[1]), Metrics())
for _ in range(int(sys.argv[2])):
    usage.record("a", "one", UsageCounts(1, 3, 1, 2))
print("recorded", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder: Path, number: int) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "recorded\n"
    return process


async def test_usage_outlives_a_kill_and_a_folder_has_one_server(tmp_path: Path) -> None:
    folder = tmp_path / "usage"
    process = killed(folder, 1000)
    with pytest.raises(
        UsageError, match=f"in use by another server .process {process.pid} on .+.; allowed: a folder of its"
    ):
        Usage(folder, Metrics())
    process.communicate("\n")
    assert process.returncode == -9
    usage = Usage(folder, Metrics())
    assert await usage_rows(usage) == [(0, "a", "one", UsageCounts(1000, 3000, 1000, 2000))]
    usage.close()


async def test_periods_are_those_of_utc_at_the_time_of_each_call(tmp_path: Path) -> None:
    clock = Clock(NOON)
    usage = Usage(tmp_path, Metrics(), clock)
    for hours in (0, 11.99, 12, 12.5, 36):
        clock.now = NOON + hours * 3600
        usage.record("a", "one", UsageCounts(1, 1, 0, 1))
    # A clock that goes back counts in the earlier hour.
    clock.now = NOON - 3600
    usage.record("a", "two", UsageCounts(1, 1, 0, 1))
    midnight = NOON + 12 * 3600
    one = [(row[0], row[3].requests) for row in await usage_rows(usage, "day") if row[2] == "one"]
    assert one == [(midnight - DAY, 2), (midnight, 2), (midnight + DAY, 1)]
    months = [(row[0], row[2], row[3].requests) for row in await usage_rows(usage, "month")]
    november, december = (int(datetime(2026, month, 1, tzinfo=UTC).timestamp()) for month in (11, 12))
    assert months == [(november, "one", 2), (november, "two", 1), (december, "one", 3)]
    assert [row[0] for row in await usage_rows(usage, "hour", (NOON, midnight + 1))] == [
        NOON,
        midnight - 3600,
        midnight,
    ]
    before = await usage_rows(usage, "day")
    # Old hours become days and sums stay.
    await usage._in_thread(usage._totals.fold, NOON + 100 * DAY)
    assert await usage_rows(usage, "day") == before
    assert {row[0] for row in await usage_rows(usage, "hour")} == {midnight - DAY, midnight, midnight + DAY}
    usage.close()


async def test_many_pairs_come_in_pages_and_memory_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(NOON)
    usage = Usage(None, Metrics(), clock)
    for number in range(2500):
        usage.record("a", f"task-{number}", UsageCounts(1))
    pages = [len(page) async for page in usage.read(*ALWAYS, "day")]
    assert pages == [1000, 1000, 500]
    # An abandoned reader leaves no open transaction.
    async with aclosing(usage.read(*ALWAYS, "day")) as read:
        await anext(read)
    left = await usage._in_thread(lambda: list(usage._totals._database.execute("SELECT * FROM sqlite_temp_master")))
    assert not left
    clock.now += 3600
    usage.record("a", "late", UsageCounts(1))
    assert len(await usage_rows(usage)) == 2501
    monkeypatch.setattr("server.accounting.totals._MAX_ROWS_IN_MEMORY", 2000)
    await usage._in_thread(usage._totals.fold, int(clock.now))
    assert [row[2] for row in await usage_rows(usage)] == ["late"]
    assert await usage.counted_since() == NOON + 3600
    assert not usage.durable
    usage.close()


@pytest.mark.parametrize(
    ("quota", "until"),
    [
        ("daily_requests", "2026-12-01"),
        ("daily_tokens", "2026-12-01"),
        ("monthly_requests", "2026-12-01"),
        ("monthly_tokens", "2026-12-01"),
    ],
)
async def test_a_budget_is_refused_until_its_period_ends_also_after_a_restart(
    tmp_path: Path, quota: str, until: str
) -> None:
    clock, metrics = Clock(NOON), Metrics()
    clock.now -= 3 * DAY if quota.startswith("monthly") else 0
    usage = Usage(tmp_path, metrics, clock)
    limited = Tenant.model_validate({"id": "a", quota: 10})
    per_call = UsageCounts(1, 3, 0, 2) if quota.endswith("tokens") else UsageCounts(5)
    for _ in range(2):
        usage.check(limited)
        usage.record("a", "one", per_call)
        usage.record("b", "one", per_call)
        usage.close()
        usage = Usage(tmp_path, metrics, clock)
    if quota.startswith("monthly"):
        clock.now += 2 * DAY
    with pytest.raises(Exception, match=f"tenant:a: over its quota: 10 {quota}") as refused:
        usage.check(limited)
    error = refused.value
    wait = next(each for each in error.details if isinstance(each, error_details_pb2.RetryInfo)).retry_delay.seconds
    assert datetime.fromtimestamp(clock.now + wait, UTC) == datetime.fromisoformat(until).replace(tzinfo=UTC)
    clock.now += wait - 1
    with pytest.raises(Exception, match=quota):
        usage.check(limited)
    clock.now += 1
    usage.check(limited)
    # A clock that goes back gives no budget twice.
    clock.now -= 1
    with pytest.raises(Exception, match=quota):
        usage.check(limited)
    usage.check(Tenant(id="b"))
    usage.close()


@asynccontextmanager
async def serving(folder: Path, **fields: object) -> AsyncIterator[Service]:
    """A server with a durable usage, tenant a and an admin."""
    service = Service.with_tenants(folder, {"a": fields, "admin": {"admin": True}}, usage_dir=folder / "usage")
    # Three of the prompt's tokens came from the prefix cache.
    service.engine.deltas = [replace(each, cached_tokens=3) for each in service.engine.deltas]
    async with service.running():
        yield service
    service.usage.close()


async def test_answers_are_counted_as_their_summaries_say_and_the_command_prints_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as service:
        expected: Counter[str] = Counter()
        async with service.client("a") as client:
            for text in ("abc", "abcdef"):
                summary = (await client.generate("one", text)).summary
                assert summary.cached_tokens == 3
                streamed = [piece async for piece in client.stream("one", text)][-1].summary
                for each in (summary, streamed):
                    expected["requests"] += 1
                    for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
                        expected[name] += getattr(each, name)
            with pytest.raises(ServerError):
                await client.generate("none", "x")
            # A batch counts each of its inputs.
            tensor = oi.ModelInferRequest.InferInputTensor(
                name="text_input", datatype="BYTES", shape=[2], contents={"bytes_contents": [b"ab", b"cd"]}
            )
            async with grpc.aio.insecure_channel(service.address) as channel:
                await grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
                    oi.ModelInferRequest(model_name="two", inputs=[tensor]),
                    metadata=service.access("a").metadata(),
                )
            with pytest.raises(ServerError, match="not an admin"), Client(service.address, service.access("a")) as own:
                await asyncio.to_thread(own.usage)
            with pytest.raises(ServerError, match="not an admin"):
                await client.usage()
        monkeypatch.setenv("MTLORA_API_KEY", service.keys["admin"])
        assert await asyncio.to_thread(main, ["usage", "--address", service.address, "--by", "total"]) == 0
        printed = capsys.readouterr()
        one, two = map(json.loads, printed.out.splitlines())
        assert one == {"tenant": "a", "task": "one", **expected}
        assert (two["task"], two["requests"]) == ("two", 2)
        assert "was not counted" in printed.err
        (day,) = await asyncio.to_thread(
            lambda: list(Client(service.address, service.access("admin")).usage(tenant="a", task="one", by="day"))
        )
        async with service.client("admin") as admin:
            report = await admin.usage(tenant="a", task="one", by="day")
            assert [each async for each in report] == [day]
            assert report.durable
        assert day.begins.seconds % DAY == 0
        assert (day.requests, day.prompt_tokens) == (expected["requests"], expected["prompt_tokens"])


async def test_a_stream_is_counted_before_its_summary_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as service, service.client("a") as client:
        on_file: list[tuple[bool, int]] = []
        encode = encoding.stream_response

        def noting(delta: Delta, generation: Generation) -> pb.GenerateStreamResponse:
            on_file.append((delta.finish_reason is not None, len(list(parse(service.usage._journal.read(1, 0))))))
            return encode(delta, generation)

        monkeypatch.setattr(encoding, "stream_response", noting)
        assert [piece async for piece in client.stream("one", "abc")][-1].HasField("summary")
        # A slow reader gets several deltas as one.
        assert on_file[-1] == (True, 1)
        assert not any(records for last, records in on_file if not last)
        assert [row[3].requests for row in await service.used()] == [1]


async def test_cancelled_calls_count_what_was_made_and_the_servers_own_failures_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as service, service.client("a") as client:
        service.engine.error = RuntimeError("broken")
        with pytest.raises(ServerError, match="internal"):
            await client.generate("one", "abc")
        assert not await service.used()
        service.engine.error, service.engine.hold = None, asyncio.Event()
        stream = client.stream("one", "abc")
        await anext(stream)
        await stream.aclose()
        await eventually(lambda: not service.engine.running)
        await eventually(
            lambda: service.value("mtlora_requests_total", method="GenerateStream", task="one", status="CANCELLED") == 1
        )
        ((_, _, _, counts),) = await service.used()
        assert counts.requests == 1
        assert counts.completion_tokens == 1


async def test_a_tenant_over_its_budget_is_refused_at_receipt(tmp_path: Path) -> None:
    async with serving(tmp_path, daily_requests=1) as service:
        async with service.client("a") as client:
            await client.generate("one", "abc")
            with pytest.raises(ServerError) as refused:
                await client.generate("one", "abc")
            assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refused.value.message == "tenant:a: over its quota: 1 daily_requests"
            assert 0 < (refused.value.retry_after_s or 0) <= DAY
            assert len(service.engine.jobs) == 1
        assert service.value("mtlora_quota_refusals_total", tenant="a", quota="daily_requests") == 1


@pytest.mark.slow
async def test_calls_are_refused_while_too_many_records_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as service, service.client("a") as client:
        write = os.write

        def full(file: int, data: bytes) -> int:
            if file == service.usage._journal._file:
                raise OSError(errno.ENOSPC, "no space left")
            return write(file, data)

        monkeypatch.setattr("server.accounting.journal._MAX_UNWRITTEN", 50)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            answered = 0
            while not service.usage.stuck:
                await client.generate("one", "abc")
                answered += 1
            with pytest.raises(ServerError, match="UNAVAILABLE: the server cannot record usage"):
                await client.generate("one", "abc")
            assert service.value("mtlora_accounting_failures_total", log="usage") == answered
        watching = asyncio.create_task(service.usage.run())
        await eventually(lambda: not service.usage.stuck)
        watching.cancel()
        await client.generate("one", "abc")
        assert [row[3].requests for row in await service.used()] == [answered + 1]


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "usage.db").write_bytes(b"no database" * 100)
    with pytest.raises(UsageError, match=f"usage_dir: {tmp_path}: file is not a database"):
        Usage(tmp_path, Metrics())
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"usage_dir: .*file"):
        Usage(tmp_path / "file", Metrics())


def test_a_fleets_budgets_are_divided_by_its_replicas() -> None:
    shared = Tenant(id="a", daily_tokens=100, monthly_requests=10, daily_requests=0).share(3)
    assert (shared.daily_tokens, shared.monthly_requests) == (34, 4)
    assert (shared.daily_requests, shared.monthly_tokens) == (0, None)
