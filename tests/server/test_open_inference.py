"""The Open Inference Protocol over gRPC, around a fake engine."""

import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mtlora_pb.v1 import inference_pb2 as native
from openinference_pb import grpc_predict_v2_pb2 as pb
from openinference_pb import grpc_predict_v2_pb2_grpc

from mtlora.client import ServerError
from server.job import ServedTask
from server.rpc.openinference import parameters, tensors
from server.scheduling.admission import State
from tests.server.adapters import entry
from tests.server.fakes import Service
from tests.server.helpers import code_of
from tests.server.typed import LABEL, with_types


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service().running() as service:
        service.serve(ServedTask(entry("pair", template="{first} {second}"), "alpha", "1", slot=None))
        yield service


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)


def infer(*texts: str, model: str = "one", name: str = "text_input", raw: bool = False, **given: Any) -> Any:
    """A request as KServe's and Triton's clients make it."""
    request = pb.ModelInferRequest(model_name=model, id="7")
    add(request, name, texts, raw=raw)
    json_format.ParseDict({"parameters": given}, request)
    return request


def add(request: pb.ModelInferRequest, name: str, texts: Any, *, raw: bool = False, shape: Any = None) -> None:
    tensor = request.inputs.add(name=name, datatype="BYTES", shape=shape or [len(texts)])
    elements = [text.encode() for text in texts]
    if raw:
        request.raw_input_contents.append(b"".join(struct.pack("<I", len(each)) + each for each in elements))
    else:
        tensor.contents.bytes_contents.extend(elements)


async def failure(stub: Any, request: Any, method: str = "ModelInfer") -> ServerError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub, method)(request)
    return ServerError(raised.value)


async def test_describes_server_models_and_repository(service: Service, stub: Any) -> None:
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await stub.ModelReady(pb.ModelReadyRequest(name="one"))).ready
    assert (await stub.ServerMetadata(pb.ServerMetadataRequest())).name == "mtlora-server"
    model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="pair", version="1"))
    assert (model.name, list(model.versions)) == ("pair", ["1"])
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in model.inputs] == [
        ("first", "BYTES", [-1]),
        ("second", "BYTES", [-1]),
    ]
    assert [tensor.name for tensor in model.outputs] == ["text_output"]
    for request in (pb.ModelReadyRequest(name="none"), pb.ModelReadyRequest(name="one", version="2")):
        assert (await failure(stub, request, "ModelReady")).code is grpc.StatusCode.NOT_FOUND
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
    assert [(each.name, each.version, each.state) for each in index.models] == [
        ("one", "1", "READY"),
        ("two", "1", "READY"),
        ("pair", "1", "READY"),
    ]
    service.admission.state = State.DRAINING
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert (await failure(stub, infer("x"))).code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("shape", [[3], [3, 1]])
async def test_outputs_have_the_form_of_the_inputs(service: Service, stub: Any, raw: bool, shape: list[int]) -> None:
    request = infer("a", "b", "c", raw=raw)
    request.inputs[0].shape[:] = shape
    reply = await stub.ModelInfer(request)
    assert (reply.model_name, reply.model_version, reply.id) == ("one", "1", "7")
    (output,) = reply.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("text_output", "BYTES", shape)
    if raw:
        assert list(reply.raw_output_contents) == [b"\2\0\0\0ab" * 3]
    else:
        assert list(output.contents.bytes_contents) == [b"ab"] * 3
    assert len({job.prompt_ids for job in service.engine.jobs}) == 3
    # One request with three sequences' tokens.
    assert service.value("mtlora_requests_total", method="ModelInfer", task="one", status="OK") == 1
    assert service.value("mtlora_completion_tokens_total", task="one") == 6


async def test_each_field_is_a_tensor(service: Service, stub: Any) -> None:
    request = pb.ModelInferRequest(model_name="pair")
    add(request, "second", ["2", "4"])
    add(request, "first", ["1", "3"])
    await stub.ModelInfer(request)
    prompts = {"".join(map(chr, job.prompt_ids)) for job in service.engine.jobs}
    assert prompts == {"1 2", "3 4"}


async def test_parameters_become_native_ones(service: Service, stub: Any) -> None:
    given = {
        "max_tokens": {"int64Param": 5}, "temperature": {"stringParam": "0.5"}, "top_p": {"doubleParam": 0.5},
        "top_k": {"uint64Param": 3}, "seed": {"int64Param": 9}, "stop": {"stringParam": "!"},
        "without_adapter": {"boolParam": True},
    }  # fmt: skip
    await stub.ModelInfer(infer("x", **given))
    (job,) = service.engine.jobs
    sampling = job.sampling
    assert job.without_adapter
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (5, 0.5, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.stop) == (3, 9, ("!",))


async def test_sampling_parameters_become_native_ones(service: Service, stub: Any) -> None:
    given = {
        "temperature": {"doubleParam": 1.0}, "best_of": {"int64Param": 2}, "min_p": {"doubleParam": 0.5},
        "presence_penalty": {"stringParam": "0.5"}, "frequency_penalty": {"doubleParam": -1.0},
        "repetition_penalty": {"doubleParam": 1.5}, "min_tokens": {"int64Param": 1}, "priority": {"int64Param": -3},
        "logit_bias": {"stringParam": "65:-1.5, 66:2"}, "allowed_tokens": {"stringParam": "65,66"},
        "banned_tokens": {"stringParam": ""}, "stop_token_ids": {"stringParam": " 67 "},
    }  # fmt: skip
    reply = await stub.ModelInfer(infer("x", **given))
    assert list(reply.outputs[0].shape) == [1]
    first, second = service.engine.jobs
    more = first.sampling.more
    assert (first.best_of, first.priority, more.min_p, more.presence_penalty) == (2, -3, 0.5, 0.5)
    assert (more.frequency_penalty, more.repetition_penalty, more.min_new_tokens) == (-1.0, 1.5, 1)
    assert (more.logit_bias, more.allowed_tokens) == ({65: -1.5, 66: 2.0}, (65, 66))
    assert (more.banned_tokens, more.stop_token_ids) == ((), (67,))
    assert second.sampling.more.logit_bias == more.logit_bias


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"logit_bias": {"stringParam": "65"}}, "found '65'; allowed: token ids and biases"),
        ({"logit_bias": {"stringParam": "a:1"}}, "found 'a:1'; allowed: token ids and biases"),
        ({"allowed_tokens": {"stringParam": "65;66"}}, "found '65;66'; allowed: token ids, such as 5, 17"),
        ({"stop_token_ids": {"stringParam": "-1"}}, "found '-1'; allowed: token ids, such as 5, 17"),
        ({"banned_tokens": {"int64Param": 5}}, "found int64_param; allowed: string_param"),
        ({"priority": {"int64Param": 2**40}}, f"found '{2**40}'; allowed: -2147483648 to 2147483647"),
        ({"n": {"int64Param": 2}}, "unknown; allowed: max_tokens"),
    ],
)
async def test_names_what_is_no_sampling_parameter(stub: Any, given: Any, found: str) -> None:
    error = await failure(stub, infer("x", **given))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0][0] == f"parameters[{next(iter(given))}]"
    assert error.violations[0][1].startswith(found)


async def test_free_leaves_a_typed_answer_free(service: Service, stub: Any) -> None:
    with_types(service)
    await stub.ModelInfer(infer("x", model="number"))
    await stub.ModelInfer(infer("x", model="number", free={"boolParam": True}))
    held, free = service.engine.jobs
    assert (held.answer_type, free.answer_type, free.sampling.constraint) == ("number", "", None)


def counts(reply: Any) -> dict[str, int]:
    return {name.removesuffix("_tokens"): each.int64_param for name, each in reply.parameters.items()}


async def test_a_response_counts_tokens_as_usage_does(service: Service, stub: Any) -> None:
    reply = await stub.ModelInfer(infer("x", "yz", best_of={"int64Param": 2}, temperature={"doubleParam": 1}))
    prompt = 2 * sum(len(f"{text}\nAnswer:") for text in ("x", "yz"))
    assert counts(reply) == {"prompt": prompt, "cached": 0, "completion": 8, "working": 0}
    with_types(service)
    request = scored("x")
    request.model_name = "worked"
    # The working's two tokens, and one at each of the two places where labels part.
    reply = await stub.ModelInfer(request)
    assert counts(reply) == {"prompt": len("x\nAnswer:"), "cached": 0, "completion": 4, "working": 0}


def scored(*texts: str, outputs: tuple[str, ...] = ("label", "probabilities"), **given: Any) -> Any:
    """A request for outputs of a task of labels."""
    request = infer(*texts, model="label", **given)
    for name in outputs:
        request.outputs.add(name=name)
    return request


@pytest.mark.parametrize("outputs", [("label",), ("probabilities",), ("text_output", "labels")])
async def test_scored_outputs_take_no_sampling(service: Service, stub: Any, outputs: tuple[str, ...]) -> None:
    with_types(service)
    given = {"temperature": {"doubleParam": 0.5}, "best_of": {"int64Param": 4}, "stop": {"stringParam": "!"}}
    error = await failure(stub, scored("x", outputs=outputs, **given))
    assert [field for field, _ in error.violations] == [f"parameters[{name}]" for name in sorted(given)]
    assert error.violations[0][1].endswith("allowed: max_tokens, priority, without_adapter")
    kept = {"max_tokens": {"int64Param": 5}, "priority": {"int64Param": 2}, "without_adapter": {"boolParam": True}}
    await stub.ModelInfer(scored("x", outputs=outputs, **kept))
    assert {(job.priority, job.without_adapter) for job in service.engine.jobs} == {(2, True)}


async def test_a_scored_element_takes_one_place(tmp_path: Path) -> None:
    """The task's own best_of counts for generated answers alone."""
    limits = {"requests_per_second": 0.01, "burst_seconds": 300}
    async with Service.with_tenants(tmp_path, {"a": limits}).running() as service:
        with_types(service)
        spec = entry("label", answer=LABEL, defaults={"temperature": 1.0, "n": 2, "best_of": 8})
        service.serve(ServedTask(spec, "alpha", "1", slot=None))
        async with grpc.aio.insecure_channel(service.address) as channel:
            stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
            reply = await stub.ModelInfer(scored("x", "y"), metadata=service.access("a").metadata())
    assert [each.name for each in reply.outputs] == ["label", "probabilities"]


async def test_names_all_violations_at_once(stub: Any) -> None:
    given = {"tempreture": {"doubleParam": 1}, "max_tokens": {"stringParam": "five"}, "seed": {"int64Param": -1}}
    request = infer("x", name="text", **given)
    request.outputs.add(name="logits")
    error = await failure(stub, request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [field for field, _ in error.violations] == [
        "parameters[max_tokens]", "parameters[seed]", "parameters[tempreture]", "inputs", "outputs",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: setattr(r.inputs[0], "datatype", "FP32"), "datatype"),
        (lambda r: r.inputs[0].shape.extend([2]), "shape"),
        (lambda r: r.inputs[0].shape.__setitem__(0, 2), "1 elements in a tensor"),
        (lambda r: r.inputs[0].shape.__setitem__(0, 1000), "1 to 64"),
        (lambda r: r.inputs[0].contents.bytes_contents.__setitem__(0, b"\xff"), "UTF-8"),
        (lambda r: r.raw_input_contents.append(b"\1\0\0\0x"), "beside raw_input_contents"),
    ],
)
async def test_refuses_tensors_that_hold_no_texts(stub: Any, change: Any, said: str) -> None:
    request = infer("x")
    change(request)
    error = await failure(stub, request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in error.message


async def test_refuses_what_the_native_service_refuses(stub: Any) -> None:
    error = await failure(stub, infer("x", "  "))
    assert (error.code, [field for field, _ in error.violations]) == (grpc.StatusCode.INVALID_ARGUMENT, ["text"])


async def test_tenants_see_their_models_and_admins_change_them(tmp_path: Path) -> None:
    tenants = {"a": {"tasks": ["one"], "requests_per_second": 0.01, "burst_seconds": 400}, "root": {"admin": True}}
    load, unload = pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest
    made = Service.with_tenants(tmp_path, tenants)
    async with made.running() as service, grpc.aio.insecure_channel(service.address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        a, admin = (service.access(name).metadata() for name in ("a", "root"))
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert (await failure(stub, infer("x"))).code is grpc.StatusCode.UNAUTHENTICATED
        index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(), metadata=a)
        assert [each.name for each in index.models] == ["one"]

        async def code(method: str, request: Any, metadata: Any) -> grpc.StatusCode:
            return await code_of(getattr(stub, method)(request, metadata=metadata))

        assert await code("ModelInfer", infer("x", model="two"), a) is grpc.StatusCode.NOT_FOUND
        assert await code("RepositoryModelLoad", load(model_name="m"), a) is grpc.StatusCode.PERMISSION_DENIED
        # Calls of any kind count: one request is left for three elements.
        assert await code("ModelInfer", infer("x", "y", "z"), a) is grpc.StatusCode.RESOURCE_EXHAUSTED
        # Triton's form, then KServe's: its only field has the number of Triton's repository name.
        reply = await stub.RepositoryModelLoad(load(repository_name="r", model_name="m"), metadata=admin)
        assert (reply.model_name, reply.isLoaded) == ("m", True)
        assert (await stub.RepositoryModelUnload(unload(repository_name="n"), metadata=admin)).isUnloaded
        assert await code("RepositoryModelUnload", unload(), admin) is grpc.StatusCode.INVALID_ARGUMENT
    assert service.registry.asked == [("load", "m"), ("unload", "n")]
    assert service.engine.running == 0


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
async def test_a_starting_server_has_no_repository_yet(method: str) -> None:
    async with Service().running() as service, grpc.aio.insecure_channel(service.address) as channel:
        del service.adapters.registry
        service.admission.state = State.STARTING
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(stub, method)(getattr(pb, f"{method}Request")(model_name="one"))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


TENSORS = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["text_input", "x", ""]),
    datatype=st.sampled_from(["BYTES", "FP32", ""]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=3),
    contents=st.builds(pb.InferTensorContents, bytes_contents=st.lists(st.binary(max_size=5), max_size=3)),
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(inputs=st.lists(TENSORS, max_size=3), raw=st.lists(st.binary(max_size=20), max_size=3))
def test_any_tensors_become_texts_or_violations(inputs: list[Any], raw: list[bytes]) -> None:
    request = pb.ModelInferRequest(inputs=inputs, raw_input_contents=raw)
    try:
        texts = tensors.read_texts(request, ["text_input"])
    except tensors.TensorError as error:
        assert error.violations  # noqa: PT017
        return
    assert [len(texts["text_input"])] == list(request.inputs[0].shape)[:1]


@given(
    st.dictionaries(
        st.sampled_from(parameters.ALLOWED) | st.text(max_size=9),
        st.builds(pb.InferParameter, double_param=st.floats())
        | st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1))
        | st.builds(pb.InferParameter, uint64_param=st.integers(0, 2**64 - 1))
        | st.builds(pb.InferParameter, string_param=st.text(max_size=5))
        | st.builds(pb.InferParameter, bool_param=st.booleans())
        | st.builds(pb.InferParameter),
        max_size=5,
    )
)
def test_any_parameters_apply_or_become_violations(given: dict[str, pb.InferParameter]) -> None:
    request = native.GenerateRequest()
    violations = list(parameters.apply(given, request))
    assert len(violations) <= len(given)
    assert request.SerializeToString() or violations or not given or set(given) <= {"stop", "without_adapter", "free"}
