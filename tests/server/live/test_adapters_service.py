"""Adapters that come and go on the session's server: every call of the service, on the real engine."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import adapters_pb2 as pb

from benchmarks.harness.waiting import wait_until
from mtlora.client import Client, ServerError
from mtlora.client.metrics_page import MetricsPage
from server.cli.process import ServerProcess
from tests.server.adapters import entry, write_adapter
from tests.server.helpers import run_cli
from tests.server.live.published import published

TEXT = "The quick brown fox"
TASKS = [entry("gamma_one", stop=(), max_new_tokens=8), entry("gamma_two", stop=(), max_new_tokens=8)]


@pytest.fixture
def gamma(adapters: Path, client: Client) -> Iterator[Path]:
    with published(adapters / "gamma", client, TASKS) as folder:
        yield folder


def version(client: Client, **parameters: Any) -> str:
    return client.generate("gamma_one", TEXT, max_new_tokens=1, **parameters).summary.adapter_version


def served(client: Client, name: str) -> pb.Adapter:
    return next(adapter for adapter in client.adapters() if adapter.name == name)


def test_a_new_version_is_noticed_and_rolled_back(gamma: Path, client: Client) -> None:
    events = client.watch_adapters("gamma")
    first = client.generate("gamma_one", TEXT, logprobs=1)
    write_adapter(gamma / "2", TASKS, seed=2)
    wait_until(lambda: version(client) == "2", 60)
    second = client.generate("gamma_one", TEXT, logprobs=1)
    assert second.logprobs != first.logprobs
    seen = []
    for event in events:
        seen.append((event.version, event.stage))
        if event.stage == pb.ADAPTER_STAGE_DRAINED:
            break
    stages = ("FOUND", "VERIFIED", "LOADED", "WARMED", "SERVING")
    assert seen == [
        *(("2", pb.AdapterStage.Value(f"ADAPTER_STAGE_{stage}")) for stage in stages),
        ("1", pb.ADAPTER_STAGE_DRAINED),
    ]
    assert client.rollback_adapter("gamma").version == "1"
    assert client.generate("gamma_one", TEXT, logprobs=1).logprobs == first.logprobs
    stages_now = {each.version: each.stage for each in served(client, "gamma").versions}
    assert stages_now == {"1": pb.ADAPTER_STAGE_SERVING, "2": pb.ADAPTER_STAGE_FOUND}


def test_a_stream_finishes_on_the_version_it_began_with(gamma: Path, client: Client) -> None:
    stream = client.stream("gamma_one", TEXT, max_new_tokens=60)
    pieces = [next(stream)]
    write_adapter(gamma / "2", TASKS, seed=2)
    client.load_adapter("gamma", "2")
    assert version(client) == "2"
    pieces += stream
    assert pieces[-1].summary.adapter_version == "1"
    assert pieces[-1].summary.completion_tokens > 2


def test_cached_blocks_do_not_cross_contents_of_one_version(gamma: Path, client: Client) -> None:
    text = "word " * 100
    first = client.generate("gamma_one", text, logprobs=1)
    content = served(client, "gamma").versions[0].content
    write_adapter(gamma / "1", TASKS, seed=3)
    wait_until(lambda: served(client, "gamma").versions[0].content != content, 60)
    other = client.generate("gamma_one", text, logprobs=1)
    write_adapter(gamma / "2", TASKS, seed=3)
    client.load_adapter("gamma", "2")
    assert first.logprobs != other.logprobs
    # The same weights under another name share no cached block with it and give the same answer.
    again = client.generate("gamma_one", text, logprobs=1)
    assert again.text == other.text
    assert [each.chosen.token_id for each in again.logprobs] == [each.chosen.token_id for each in other.logprobs]


def test_a_bad_version_is_refused_and_said_why(gamma: Path, client: Client, server: ServerProcess) -> None:
    events = client.watch_adapters("gamma")
    before = MetricsPage.fetch(server.metrics).value("mtlora_adapter_failures_total", stage="verified")
    write_adapter(gamma / "2", TASKS, seed=2)
    (gamma / "2" / "adapter.safetensors").write_bytes(b"garbage")
    failed = next(event for event in events if event.stage == pb.ADAPTER_STAGE_FAILED)
    assert failed.failed_stage == pb.ADAPTER_STAGE_VERIFIED
    assert "adapter.safetensors" in failed.reason
    assert version(client) == "1"
    with pytest.raises(ServerError) as raised:
        client.load_adapter("gamma", "2")
    assert raised.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "adapter.safetensors" in raised.value.message
    (shown,) = (each for each in served(client, "gamma").versions if each.version == "2")
    assert shown.stage == pb.ADAPTER_STAGE_FAILED
    assert shown.reason == failed.reason
    assert MetricsPage.fetch(server.metrics).value("mtlora_adapter_failures_total", stage="verified") > before


def test_weights_are_sticky_by_key_else_by_input(gamma: Path, client: Client) -> None:
    write_adapter(gamma / "2", TASKS, seed=2)
    wait_until(lambda: version(client) == "2", 60)
    client.set_adapter_weights({"1": 50, "2": 50}, adapter="gamma")
    by_key = {key: version(client, routing_key=key) for key in map(str, range(12))}
    assert set(by_key.values()) == {"1", "2"}
    assert {key: version(client, routing_key=key) for key in by_key} == by_key
    by_input = [client.generate("gamma_two", f"{n} foxes", max_new_tokens=1).summary.adapter_version for n in range(12)]
    assert set(by_input) == {"1", "2"}
    assert [
        client.generate("gamma_two", f"{n} foxes", max_new_tokens=1).summary.adapter_version for n in range(12)
    ] == by_input
    client.set_adapter_weights({"1": 100}, task="gamma_one")
    assert {version(client, routing_key=key) for key in by_key} == {"1"}
    splits = {split.task: dict(split.weights) for split in served(client, "gamma").splits}
    assert splits == {"": {"1": 50, "2": 50}, "gamma_one": {"1": 100}}
    client.set_adapter_weights({}, task="gamma_one")
    client.set_adapter_weights({}, adapter="gamma")
    assert {version(client, routing_key=key) for key in by_key} == {"2"}


def test_unloading_takes_the_tasks_away(gamma: Path, client: Client) -> None:
    client.unload_adapter("gamma")
    with pytest.raises(ServerError) as raised:
        version(client)
    assert raised.value.code is grpc.StatusCode.NOT_FOUND
    assert "gamma_one" not in {task.id for task in client.tasks()}
    assert served(client, "gamma").unloaded
    client.load_adapter("gamma")
    assert version(client) == "1"


def test_swaps_under_load_lose_nothing(gamma: Path, client: Client) -> None:
    for number in (2, 3):
        write_adapter(gamma / str(number), TASKS, seed=number)
    stop, failed, versions = threading.Event(), [], set()

    def ask() -> None:
        while not stop.is_set():
            try:
                versions.add(version(client))
            except ServerError as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in (2, 3, 1, 2, 3, 1, 2, 3):
        client.load_adapter("gamma", str(number))
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert versions == {"1", "2", "3"}


def test_a_pinned_adapter_is_listed_as_pinned(gamma: Path, client: Client) -> None:
    client.pin_adapter("gamma")
    listed = served(client, "gamma")
    assert listed.pinned
    assert listed.versions[0].resident
    assert listed.versions[0].tasks == 2
    client.pin_adapter("gamma", pinned=False)
    assert not served(client, "gamma").pinned
    assert "broken" in {adapter.name for adapter in client.adapters()}


def test_the_adapters_command_changes_a_server(gamma: Path, server: ServerProcess) -> None:
    address = ("adapters", "--address", server.address)
    assert "gamma" in run_cli(*address, "list").stdout
    assert run_cli(*address, "load", "gamma").stdout.strip() == "gamma/1 serves"
    refused = run_cli(*address, "load", "gamma", "8")
    assert refused.returncode == 1
    assert "NOT_FOUND" in refused.stderr
    assert run_cli(*address, "weights", "gamma", "1:90").returncode == 2
