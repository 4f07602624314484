"""One real server, the default backbone, two random adapters and a broken one."""

import asyncio
import json
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from mtlora_pb.v1 import inference_pb2 as pb

from benchmarks.harness.processes import resident_bytes
from benchmarks.harness.waiting import wait_until
from mtlora.client import AsyncClient, Client, ServerError
from mtlora.client.metrics_page import MetricsPage
from server.cli.process import ServerProcess
from tests.server.helpers import LONG, run_cli
from tests.server.live.conftest import StartingObservations

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def engine_is_idle(server: ServerProcess) -> bool:
    found = MetricsPage.fetch(server.metrics)
    return not any(
        found.value(name)
        for name in ("mtlora_engine_running_sequences", "mtlora_engine_waiting_sequences", "mtlora_requests_in_flight")
    )


def test_answers_probes_alone_until_the_engine_runs(server: ServerProcess, starting: StartingObservations) -> None:
    assert starting.health == [NOT_SERVING]
    # The port is taken, and no connection is answered.
    assert starting.generate_code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.mark.parametrize(("service", "status"), [("", SERVING), ("mtlora.v1.Inference", SERVING)])
def test_health_is_serving(server: ServerProcess, service: str, status: int) -> None:
    with grpc.insecure_channel(server.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert reply.status == status


def test_a_unary_answer_has_a_whole_summary(client: Client) -> None:
    answer = client.generate("count_words", "one two three")
    summary = answer.summary
    assert (summary.task_id, summary.adapter_name, summary.adapter_version) == ("count_words", "alpha", "1")
    assert summary.prompt_tokens > 3
    assert 1 <= summary.completion_tokens <= 8
    assert answer.text == answer.text.strip()
    assert summary.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    times = [
        each.ToTimedelta().total_seconds()
        for each in (summary.timings.queue, summary.timings.time_to_first_token, summary.timings.total)
    ]
    assert 0 < times[0] <= times[1] <= times[2]


def test_a_repeated_prompt_has_cached_tokens_and_usage_sums_them(client: Client) -> None:
    text = " ".join(f"word{number}" for number in range(150))
    summaries = [client.generate("open", text, max_new_tokens=2).summary for _ in range(2)]
    assert summaries[0].cached_tokens < summaries[1].cached_tokens < summaries[1].prompt_tokens
    used = [each for each in client.usage(task="open", by="total") if each.tenant == "open"]
    assert used[0].cached_tokens >= summaries[1].cached_tokens


def test_the_adapter_changes_the_logprobs(client: Client) -> None:
    text = "The capital of France is"
    adapted = client.generate("open", text, logprobs=5)
    alone = client.generate("open", text, logprobs=5, without_adapter=True)
    assert alone.summary.adapter_name == ""
    assert adapted.summary.adapter_name == "beta"
    assert adapted.summary.prompt_tokens == alone.summary.prompt_tokens
    assert adapted.logprobs[0] != alone.logprobs[0]


def test_the_backbone_alone_answers_a_chat(client: Client) -> None:
    # Every token is likelier than the next best by at least 1.1 nats: no processor's rounding changes the order.
    chat = [{"role": "user", "content": "What is the name of the capital city of France?"}]
    assert client.generate("open", chat, without_adapter=True).text == "The capital city of France is Paris."


def test_named_fields_fill_the_template(client: Client) -> None:
    asked = {"without_adapter": True, "prompt_logprobs": 1, "max_new_tokens": 1}
    found = client.generate("pair", {"first": "a", "second": "b"}, **asked)
    # The template of "open" ends in the same line.
    filled = client.generate("open", "First: a\nSecond: b", **asked)
    tokens = [[token.chosen.token_id for token in each.prompt_logprobs] for each in (found, filled)]
    assert tokens[0] == tokens[1] != []


@pytest.mark.parametrize("without_adapter", [True, False])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 1.0, "seed": 7},
        {"stop": ["e"], "max_new_tokens": 30},
        # Decoded at once in one case, token by token in the other.
        {"answer": pb.AnswerType(text=pb.TextType(max_length=40)), "temperature": 2.0, "seed": 7, "max_new_tokens": 30},
    ],
)
def test_a_streams_pieces_join_to_the_unary_answer(
    client: Client, without_adapter: bool, parameters: dict[str, Any]
) -> None:
    parameters = {"without_adapter": without_adapter, **parameters}
    answer = client.generate("open", "Once upon a time", **parameters)
    pieces = list(client.stream("open", "Once upon a time", **parameters))
    assert "".join(piece.text for piece in pieces).strip() == answer.text
    assert [piece.HasField("summary") for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].summary.completion_tokens == answer.summary.completion_tokens
    if "stop" in parameters:
        assert "e" not in answer.text


def test_equal_seeds_give_equal_texts(client: Client) -> None:
    def sample(seed: int) -> str:
        return client.generate("open", "Once", temperature=1.5, seed=seed, max_new_tokens=6, without_adapter=True).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_requests_may_replace_the_tasks_stop_strings(client: Client) -> None:
    chat = [{"role": "user", "content": "List three fruits, one a line."}]
    stopped = client.generate("echo", chat, without_adapter=True, max_new_tokens=40)
    ran_on = client.generate("echo", chat, without_adapter=True, max_new_tokens=40, stop=[])
    assert "\n" not in stopped.text
    assert stopped.summary.finish_reason == pb.FINISH_REASON_STOP
    assert ran_on.text.startswith(stopped.text)
    assert "\n" in ran_on.text


def test_logprobs_of_every_token_are_ranked(client: Client) -> None:
    answer = client.generate("open", "The capital of France is", logprobs=3, max_new_tokens=4, without_adapter=True)
    assert len(answer.logprobs) == answer.summary.completion_tokens
    for token in answer.logprobs:
        assert len(token.top) == 3
        found = [each.logprob for each in token.top]
        assert found == sorted(found, reverse=True)
        # Greedy.
        assert token.chosen.token_id == token.top[0].token_id
        assert token.chosen.logprob <= 0
    assert not client.generate("open", "x", max_new_tokens=1).logprobs


def test_a_sampled_token_may_be_outside_the_top_logprobs(client: Client) -> None:
    answer = client.generate("open", "x", logprobs=1, max_new_tokens=8, temperature=2.0, seed=3, without_adapter=True)
    assert all(len(token.top) == 1 for token in answer.logprobs)
    assert all(token.chosen.logprob <= token.top[0].logprob for token in answer.logprobs)
    assert any(token.chosen.token_id != token.top[0].token_id for token in answer.logprobs)


def test_streamed_and_unary_logprobs_agree(client: Client) -> None:
    parameters: dict[str, Any] = {"logprobs": 2, "max_new_tokens": 5, "without_adapter": True}
    unary = client.generate("open", "hello", **parameters).logprobs
    streamed = [token for piece in client.stream("open", "hello", **parameters) for token in piece.logprobs]
    assert [token.chosen.token_id for token in streamed] == [token.chosen.token_id for token in unary]


def test_fills_the_context_to_its_last_token(client: Client) -> None:
    answer = client.generate("open", "word " * 1015, without_adapter=True)
    tokens = answer.summary.prompt_tokens
    assert tokens + answer.summary.completion_tokens <= 1024
    with pytest.raises(ServerError) as raised:
        client.generate("open", "word " * 1015, max_new_tokens=1024 - tokens + 1)
    assert raised.value.violations[0][0] == "parameters.max_new_tokens"


def test_an_unknown_task_is_not_found_with_near_matches(client: Client) -> None:
    with pytest.raises(ServerError) as raised:
        client.generate("sort_word", "x")
    assert raised.value.code is grpc.StatusCode.NOT_FOUND
    assert raised.value.resource == "sort_word"
    assert "sort_words" in raised.value.message
    with pytest.raises(ServerError) as raised:
        client.task("sort_word")
    assert raised.value.code is grpc.StatusCode.NOT_FOUND


def test_names_every_violation(client: Client) -> None:
    with pytest.raises(ServerError) as raised:
        client.generate("pair", {"first": "a", "third": "c"}, temperature=9, top_p=0)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [field for field, _ in raised.value.violations] == [
        "fields.values[second]", "fields.values[third]", "parameters.temperature", "parameters.top_p",
    ]  # fmt: skip


def test_refuses_messages_beyond_the_limit(client: Client) -> None:
    with pytest.raises(ServerError) as raised:
        client.generate("echo", "x" * 70_000)
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(ServerError) as raised:
        client.generate("echo", "x" * 60_000)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_lists_every_task(client: Client, server: ServerProcess) -> None:
    tasks = client.tasks(page_size=2)
    assert [task.id for task in tasks] == [
        "count_words", "echo", "look", "open", "pair", "sight", "sort_words", "view",
    ]  # fmt: skip
    assert server.num_tasks == 8
    assert {task.id: task.adapter_version for task in tasks if task.adapter_name == "beta"} == {
        "echo": "10",
        "open": "10",
    }
    pair = client.task("pair")
    assert pair == next(task for task in tasks if task.id == "pair")
    assert list(pair.fields) == ["first", "second"]
    assert list(client.task("sort_words").allowed_answers) == ["yes", "no"]


def test_leaves_out_a_broken_adapter(server: ServerProcess, client: Client) -> None:
    with pytest.raises(ServerError):
        client.task("lost")
    found = MetricsPage.fetch(server.metrics)
    assert found.value("mtlora_adapters", state="failed") == 1
    assert found.value("mtlora_adapters", state="loaded") == 3
    assert any("adapter not served" in line and "broken" in line for line in server.log().splitlines())


def test_routers_see_the_size_of_the_kv_cache(server: ServerProcess) -> None:
    cache = MetricsPage.fetch(server.metrics).labels("vllm:cache_config_info")
    assert int(cache["block_size"]) > 0
    assert int(cache["num_gpu_blocks"]) > 0


def test_a_client_can_call_by_reflection_alone(server: ServerProcess, client: Client) -> None:
    with grpc.insecure_channel(server.address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("mtlora.v1.Inference")
        method = service.FindMethodByName("Generate")
        request = message_factory.GetMessageClass(method.input_type)()
        request.task_id = "open"
        request.text = "Once upon a time"
        call = channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        reply = call(request)
    assert reply.text == client.generate("open", "Once upon a time").text


def test_reflection_names_every_service(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"mtlora.v1.Inference", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services


def test_open_inference_gives_the_native_texts(server: ServerProcess, client: Client) -> None:
    from openinference_pb import grpc_predict_v2_pb2 as oip
    from openinference_pb import grpc_predict_v2_pb2_grpc

    texts = ["Once upon a time", "Call me Ishmael"]
    with grpc.insecure_channel(server.address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerReady(oip.ServerReadyRequest()).ready

        def infer(*texts: str) -> list[str]:
            request = oip.ModelInferRequest(model_name="open")
            request.parameters["max_tokens"].int64_param = 12
            tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[len(texts)])
            tensor.contents.bytes_contents.extend(text.encode() for text in texts)
            return [element.decode() for element in stub.ModelInfer(request).outputs[0].contents.bytes_contents]

        # One at a time: in bfloat16 a request that shares a step may decide a near tie the other way.
        for text in texts:
            assert infer(text) == [client.generate("open", text, max_new_tokens=12).text]
        assert len(infer(*texts)) == 2


def test_cancelling_a_stream_frees_the_engine(server: ServerProcess, client: Client) -> None:
    stream = client.stream("open", "Once", **LONG)
    for _ in range(5):
        next(stream)
    assert not engine_is_idle(server)
    stream.close()
    wait_until(lambda: engine_is_idle(server), 10)


def test_a_deadline_frees_the_engine(server: ServerProcess, client: Client) -> None:
    with pytest.raises(ServerError) as raised:
        client.generate("open", "Once", timeout=1.0, **LONG)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: engine_is_idle(server), 10)
    assert MetricsPage.fetch(server.metrics).value("mtlora_requests_total", status="DEADLINE_EXCEEDED")


async def test_answers_thirty_requests_at_once(server: ServerProcess, client: Client) -> None:
    tasks = ["sort_words", "count_words", "echo", "open"]
    async with AsyncClient(server.address) as many:
        answers = await asyncio.gather(
            *(many.generate(tasks[i % 4], f"number {i}", without_adapter=i % 5 == 0) for i in range(30))
        )
    assert [answer.summary.task_id for answer in answers] == [tasks[i % 4] for i in range(30)]
    assert len({answer.summary.request_id for answer in answers}) == 30
    assert engine_is_idle(server)


async def test_answers_lie_within_their_types(server: ServerProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
    }
    own = pb.AnswerType(json=json.dumps(schema))
    async with AsyncClient(server.address) as many:
        hot: dict[str, Any] = {"temperature": 2.0}
        labels = [many.generate("sort_words", f"number {i}", seed=i, **hot) for i in range(12)]
        objects = [
            many.generate("open", f"number {i}", seed=i, answer=own, max_new_tokens=24 + i, **hot) for i in range(6)
        ]
        answers = await asyncio.gather(*labels, *objects)
        assert {answer.text for answer in answers[:12]} <= {"yes", "no"}
        assert all(list(answer.value) == ["name", "ok"] for answer in answers[12:])
        assert all(answer.summary.finish_reason == pb.FINISH_REASON_STOP for answer in answers)
        with pytest.raises(ServerError) as raised:
            await many.generate("open", "x", answer=own, max_new_tokens=3)
        assert "the shortest answer of this type takes" in raised.value.message
        scores = await many.score("sort_words", ["one", "two", "three"])
    # A random adapter gives both labels almost no probability, but prefers one of the two.
    assert all(sum(score.probabilities.values()) == pytest.approx(1, abs=1e-5) for score in scores)
    assert {tuple(sorted(score.probabilities)) for score in scores} == {("no", "yes")}


def test_metrics_count_a_request(server: ServerProcess, client: Client) -> None:
    requests: dict[str, str] = {"method": "Generate", "status": "OK", "task": "count_words"}
    before = MetricsPage.fetch(server.metrics).value("mtlora_requests_total", **requests)
    client.generate("count_words", "a b")
    found = MetricsPage.fetch(server.metrics)
    assert found.value("mtlora_requests_total", **requests) == before + 1
    for histogram in ("time_to_first_token", "inter_token_latency", "request", "queue"):
        assert found.value(f"mtlora_{histogram}_seconds_count") > 0
    assert found.value("mtlora_serving") == 1
    assert found.value("mtlora_tasks") == 8
    assert found.value("mtlora_completion_tokens_total", task="count_words") > 0
    assert found.value("mtlora_engine_prefix_cache_queries_total") > 0


def test_logs_json_without_prompts(server: ServerProcess, client: Client) -> None:
    answer = client.generate("echo", "zanzibar")
    wait_until(lambda: answer.summary.request_id in server.log(), 60)
    line = next(line for line in server.log().splitlines() if answer.summary.request_id in line)
    assert json.loads(line)["task"] == "echo"
    assert "zanzibar" not in server.log()


def test_all_processes_stay_below_four_gib(server: ServerProcess) -> None:
    assert resident_bytes(server.process.pid) < 4 << 30


def test_the_ask_command_prints_the_answer_or_the_error(server: ServerProcess, client: Client) -> None:
    expected = client.generate("open", "Once upon a time", without_adapter=True).text
    address = ("--address", server.address, "--without-adapter")
    assert run_cli("ask", "open", "Once upon a time", *address).stdout.strip() == expected
    assert run_cli("ask", "open", "Once upon a time", "--stream", *address).stdout.strip() == expected
    fields = run_cli("ask", "pair", "--field", "first=a", "--field", "second=b", "--verbose", *address)
    assert fields.returncode == 0
    assert 'task_id: "pair"' in fields.stderr
    wrong = run_cli("ask", "opne", "x", *address)
    assert wrong.returncode == 1
    assert "NOT_FOUND" in wrong.stderr
    assert "open" in wrong.stderr
    assert run_cli("ask", "open", "--field", "x", *address).returncode == 2


def test_the_tasks_command_prints_tasks_and_versions(server: ServerProcess) -> None:
    done = run_cli("tasks", "--address", server.address)
    assert done.returncode == 0
    assert "count_words" in done.stdout
    assert "alpha/1" in done.stdout
