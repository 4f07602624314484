"""Many tasks about one document: the contract, documents by id, and what is charged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.client import AsyncClient, DocumentAnswer, ServerError
from mtlora.client.messages import DocumentTask
from server.cli import main
from server.errors import RequestFailedError
from server.job import Delta, ServedTask
from server.registry.catalog import Catalog
from server.rpc.documents import Documents
from server.tenants import Tenant
from tests.server.adapters import entry
from tests.server.fakes import Service

# A tenant may take 90 tokens at once; they come back in an hour.
LIMITS = {"tokens_per_second": 90 / 3600, "burst_seconds": 3600}
TEMPLATE = "D:{document}\n"


def served(task_id: str, *, activation: Any = "task", **fields: Any) -> ServedTask:
    fields = {"document_template": TEMPLATE, "template": f"{task_id}?", "max_new_tokens": 4} | fields
    return ServedTask(entry(task_id, **fields), "alpha", "1", slot=None, activation=activation)


TASKS = [
    served("who"),
    served("about", template="about {what}?"),
    served("every", activation="all"),
    served("other", document_template="Other: {document}\n"),
    ServedTask(entry("plain"), "alpha", "1", slot=None),
]
CATALOG = Catalog(MappingProxyType({task.spec.id: task for task in TASKS}))


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Service, AsyncClient]]:
    service = Service(max_in_flight=8)
    service.servicer.catalog = CATALOG
    async with service.running(), AsyncClient(service.address, retry=None) as client:
        yield service, client


@asynccontextmanager
async def serving_tenants(folder: Path, tenants: dict[str, dict[str, Any]], **settings: Any) -> AsyncIterator[Service]:
    service = Service.with_tenants(folder, tenants, max_in_flight=8, **settings)
    service.servicer.catalog = CATALOG
    async with service.running():
        yield service


async def failure(client: AsyncClient, tasks: list[DocumentTask], *about: str, **named: Any) -> ServerError:
    """The failure of both forms of a call."""
    with pytest.raises(ServerError) as unary:
        await client.analyze_all(tasks, *about, **named)
    with pytest.raises(ServerError) as streamed:
        await collect(client, tasks, *about, **named)
    assert unary.value.violations == streamed.value.violations
    assert unary.value.code is streamed.value.code
    return unary.value


async def collect(client: AsyncClient, tasks: list[DocumentTask], *about: str, **named: Any) -> list[DocumentAnswer]:
    async with aclosing(client.analyze(tasks, *about, **named)) as answers:
        return [answer async for answer in answers]


async def test_tasks_of_a_document_get_its_tokens_and_their_own() -> None:
    async with serving() as (service, client):
        answers = await client.analyze_all(["who", ("about", {"what": "it"})], "text")
        assert [each.result().text for each in answers] == ["ab", "ab"]
        assert [each.index for each in answers] == [0, 1]
        prompts = ["".join(map(chr, job.prompt_ids)) for job in service.engine.jobs]
        assert prompts == ["D:text\nwho?", "D:text\nabout it?"]
        assert [job.activation for job in service.engine.jobs] == [7, 7]
        (streamed,) = await collect(client, ["who"], document_id=answers[0].document_id)
        assert streamed.result().text == "ab"
        assert streamed.document_id == answers[0].document_id
        assert service.engine.jobs[2].prompt_ids == service.engine.jobs[0].prompt_ids
        assert (await client.generate("who", "text")).text == "ab"
        assert service.engine.jobs[3].prompt_ids == service.engine.jobs[0].prompt_ids
        assert service.engine.jobs[3].activation == 7
        assert (await client.generate("every", "text")).text == "ab"
        assert service.engine.jobs[4].activation is None


WRONG: dict[str, tuple[list[DocumentTask], dict[str, str], str, str]] = {
    "no source": (["who"], {}, "document", "found none"),
    "blank": (["who"], {"document": " \n"}, "document", "only blanks"),
    "too long": (["who"], {"document": "x" * 60}, "document", "found 63 tokens or more; allowed: up to 62"),
    "no tasks": ([], {"document": "x"}, "tasks", "found 0; allowed: 1 to 1024"),
    "too many": (["who"] * 1025, {"document": "x"}, "tasks", "found 1025"),
    "acts on all": (["who", "every"], {"document": "x"}, "tasks[1].task_id", "acts on every token"),
    "no document part": (["who", "plain"], {"document": "x"}, "tasks[1].task_id", "acts on every token"),
    "other template": (["who", "other"], {"document": "x"}, "tasks[1].task_id", "another than the document's"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_call_names_its_field(wrong: str) -> None:
    tasks, source, field, description = WRONG[wrong]
    async with serving() as (service, client):
        if source:
            error = await failure(client, tasks, source["document"])
        else:
            stub = client._stub
            with pytest.raises(grpc.RpcError) as raised:
                await stub.Analyze(pb.AnalyzeRequest(tasks=[pb.DocumentTask(task_id="who")]))
            error = ServerError(raised.value)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations[0][0] == field
        assert description in error.violations[0][1]
        assert not service.engine.jobs


async def test_a_task_that_fails_harms_no_other() -> None:
    async with serving() as (_, client):
        tasks: list[DocumentTask] = ["who", "absent", "about", ("who", {"what": "it"}), ("about", {"what": "y" * 60})]
        answers = await client.analyze_all(tasks, "text")
        assert answers[0].result().text == "ab"
        errors = [each.error for each in answers[1:] if each.error]
        assert [error.code.name for error in errors] == ["NOT_FOUND"] + ["INVALID_ARGUMENT"] * 3
        found = [error.violations[0] for error in errors[1:]]
        assert found[0] == ("fields.values[what]", "missing; task about takes what")
        assert found[1] == ("fields.values[what]", "unknown; task who takes none")
        assert "too long" in found[2][1]
        (only,) = [await failure(client, ["absent"], "text")]
        assert only.code is grpc.StatusCode.NOT_FOUND


async def test_unknown_expired_and_other_tenants_ids_look_alike(tmp_path: Path) -> None:
    async with serving_tenants(tmp_path, {"a": {}, "b": {}}, document_lifetime_s=0.2) as service:
        async with service.client("a") as a, service.client("b") as b:
            (answer,) = await a.analyze_all(["who"], "text")
            named = {"document_id": answer.document_id}
            (again,) = await a.analyze_all(["who"], **named)
            assert again.result().text == "ab"
            others = await failure(b, ["who"], **named)
            unknown = await failure(a, ["who"], document_id="0" * 64)
            await asyncio.sleep(0.25)
            expired = await failure(a, ["who"], **named)
            (own,) = await b.analyze_all(["who"], "text")
            assert own.document_id != answer.document_id
        assert {each.code for each in (others, unknown, expired)} == {grpc.StatusCode.NOT_FOUND}
        assert others.message == unknown.message == expired.message


async def test_a_document_is_charged_once_and_what_was_cached_is_refunded(tmp_path: Path) -> None:
    # Four tasks of 50 + 4 tokens and answers of 4: beyond the bucket, were each charged the document.
    async with serving_tenants(tmp_path, {"a": LIMITS}) as service:
        service.engine.deltas = [Delta("a", 1), Delta("b", 1, finish_reason="stop")]
        async with service.client("a") as client:
            tasks: list[DocumentTask] = ["who"] * 4
            answers = await client.analyze_all(tasks, "x" * 47)
            assert all(each.answer for each in answers)
            assert [job.shared for job in service.engine.jobs] == [0, 50, 50, 50]
            # The engine reports that nothing was cached, so the whole document is charged.
            error = await failure(client, tasks, "x" * 47)
            assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_cached_tokens_cost_nothing(tmp_path: Path) -> None:
    async with serving_tenants(tmp_path, {"a": LIMITS}) as service:
        service.engine.deltas = [Delta("a", 1, cached_tokens=52), Delta("b", 1, finish_reason="stop")]
        async with service.client("a") as client:
            for _ in range(4):
                (answer,) = await client.analyze_all(["who"], "x" * 47)
                assert answer.result().summary.cached_tokens == 52


async def test_the_command_prints_a_row_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "note.txt"
    file.write_text("text")
    async with serving() as (service, _):

        def run(*arguments: str) -> int:
            return main(["analyze", *arguments, "--address", service.address])

        # The more common of two templates is asked; `about` needs another field.
        assert await asyncio.to_thread(run, str(file)) == 0
        printed = capsys.readouterr().out
        assert "who" in printed
        assert "1 tasks about one document" in printed
        assert "of 11 prompt tokens, 11 were computed" in printed
        assert await asyncio.to_thread(run, str(file), "--task", "who", "--task", "about") == 1
        assert "fields.values[what]: missing" in " ".join(capsys.readouterr().out.split())
        assert await asyncio.to_thread(run, str(file), "--task", "every") == 1
        assert "acts on every token" in capsys.readouterr().err
        assert await asyncio.to_thread(run, str(tmp_path / "absent")) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.floats(0, 4), st.booleans()), min_size=1, max_size=30
    ),
    st.integers(0, 3),
)
def test_documents_stay_within_their_limits(uses: list[tuple[str, int, float, bool]], most: int) -> None:
    now = [0.0]
    documents = Documents(lifetime_s=5, max_documents=9, max_mib=10 * 4 / (1 << 20), clock=lambda: now[0])
    tenants = {name: Tenant(id=name, max_documents=most) for name in "ab"}
    used: dict[tuple[str, str], float] = {}
    for name, size, later, by_id in uses:
        now[0] += later
        document = replace(documents.keep(tenants[name], "t", range(size)))
        used[name, document.id] = now[0]
        if by_id:
            now[0] += 1
        for other in "ab":
            try:
                found = documents.get(tenants[other], document.id)
            except RequestFailedError:
                continue
            assert (other, document.id) in used
            assert now[0] - used[other, document.id] < 5
            assert found == document
            used[other, document.id] = now[0]
        for held in documents._held.values():
            assert len(held) <= most
            assert sum(each.num_bytes for each in held.values()) <= 40
    now[0] += 5
    documents.keep(tenants["a"], "t", [1] * 100)
    assert not documents._until
    assert not documents._held
