"""The GRPCInferenceService: each method converts its request to the native service and the answer back."""

from collections.abc import Sequence
from typing import Any

from mtlora_pb.v1 import inference_pb2 as native
from openinference_pb import grpc_predict_v2_pb2 as pb
from openinference_pb import grpc_predict_v2_pb2_grpc

from mtlora import __version__
from server.call import current_call
from server.errors import Violation, invalid_argument, task_not_found
from server.job import ServedTask
from server.rpc.adapters_service import AdaptersServicer, statuses
from server.rpc.batch import TextItem, answering, samples
from server.rpc.classify import ImageItem, classifying
from server.rpc.inference_service import InferenceServicer
from server.rpc.openinference import parameters, tensors
from server.rpc.pictures import Picture
from server.rpc.pieces import in_pieces
from server.rpc.scoring import scoring
from server.rpc.validation import samples_of
from server.scheduling.admission import Admission, State
from server.tenants.authentication import require_admin

_PLATFORM = "mtlora"
_EXTENSIONS = ("model_repository",)


class OpenInferenceServicer(grpc_predict_v2_pb2_grpc.GRPCInferenceServiceServicer):
    """Calls run through `service`: tenants, quotas, validation and queue are the same as for native calls."""

    def __init__(self, service: InferenceServicer, admission: Admission, adapters: AdaptersServicer) -> None:
        self._service = service
        self._admission = admission
        self._adapters = adapters

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._admission.state is State.SERVING)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        self._task(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._admission.state is State.SERVING)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="mtlora-server", version=__version__, extensions=_EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        self._admission.check_serving()
        task = self._task(request.name, request.version)

        def tensor(name: str) -> pb.ModelMetadataResponse.TensorMetadata:
            # An image may also be sent as FP32, but the protocol allows one type per name.
            datatype, shape = "BYTES", [-1]
            if name == tensors.PROBABILITIES_OUTPUT:
                datatype, shape = "FP32", [-1, len(task.spec.labels or ())]
            return pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=shape)

        return pb.ModelMetadataResponse(
            name=task.spec.id,
            versions=[task.adapter_version],
            platform=_PLATFORM,
            inputs=[tensor(name) for name in tensors.input_names(task.spec)],
            outputs=list(map(tensor, tensors.output_names(task.spec))),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        self._admission.check_serving()
        task = self._task(request.model_name, request.model_version)
        if task.spec.picture is not None:
            allowed = "those of texts or of images (Generate of mtlora.v1 asks this one)"
            refused = f"found {task.spec.id!r}, a task of text and image; allowed: {allowed}"
            raise invalid_argument([Violation("model_name", refused)])
        items = await (self._generate(request, task) if task.spec.image is None else self._classify(request, task))
        return _response(request, task, items)

    async def _generate(self, request: pb.ModelInferRequest, task: ServedTask) -> list[TextItem]:
        """Generate or score the elements."""
        call, requests, scored = current_call.get(), _requests(request, task), tensors.scored(request)
        items = [
            TextItem(each, task, call, 1 if scored else samples_of(each, task), index)
            for index, each in enumerate(requests)
        ]
        await self._service.batches.whole(items, scoring(self._service.backend, calibrated=True) if scored else samples)
        return items

    async def _classify(self, request: pb.ModelInferRequest, task: ServedTask) -> list[ImageItem]:
        """Classify the elements."""
        violations = [
            Violation(f"parameters[{name[:32]}]", "unknown; allowed: none for a task of images")
            for name in sorted(request.parameters)
        ]
        try:
            images = tensors.read_images(request, tensors.output_names(task.spec))
        except tensors.TensorError as error:
            violations += error.violations
        if violations:
            raise invalid_argument(violations)
        call = current_call.get()
        items = [ImageItem(Picture(image, f"inputs[0][{i}]", ""), task, call, 1, i) for i, image in enumerate(images)]
        await self._service.classifier.batches.whole(items, classifying(calibrated=True))
        return items

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        state = "READY" if self._admission.state is State.SERVING else "UNAVAILABLE"
        if request.ready and state != "READY":
            return pb.RepositoryIndexResponse()
        index = pb.RepositoryIndexResponse.ModelIndex
        tasks, ids = self._service.catalog.tasks, await self._service.visible()
        return pb.RepositoryIndexResponse(
            models=[
                index(name=task_id, version=tasks[task_id].adapter_version, state=state)
                async for task_id in in_pieces(ids)
                if task_id in tasks
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> pb.RepositoryModelLoadResponse:
        name = self._model_to_change(request)
        adapter = self._adapter_of(name)
        with statuses(adapter):
            await self._adapters.registry.load(adapter)
        return pb.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        name = self._model_to_change(request)
        adapter = self._adapter_of(name)
        with statuses(adapter):
            await self._adapters.registry.unload(adapter)
        return pb.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)

    def _task(self, name: str, version: str) -> ServedTask:
        if not name:
            raise invalid_argument([Violation("name", "found none; allowed: a model that RepositoryIndex shows")])
        task = self._service.task(name)
        if version and version != task.adapter_version:
            raise task_not_found(f"{name}/{version}", [f"{name}/{task.adapter_version}"])
        return task

    def _model_to_change(self, request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest) -> str:
        # KServe's clients put the name where Triton's put the repository's.
        name = request.model_name or request.repository_name
        # This labels the call; the model may be an adapter instead of a task.
        self._service.find(name)
        require_admin(current_call.get().tenant)
        self._admission.check_serving()
        if not name:
            raise invalid_argument([Violation("model_name", "found none; allowed: a model's name")])
        return name

    def _adapter_of(self, model: str) -> str:
        """The adapter of a served task, or the model itself: an adapter's name."""
        task = self._service.catalog.tasks.get(model)
        return task.adapter_name if task else model


def _response(request: pb.ModelInferRequest, task: ServedTask, items: Sequence[Any]) -> pb.ModelInferResponse:
    """The response with the requested outputs, and the tokens of all elements."""
    generations: list[Any] = [
        answering(item.generations)[0] if len(item.generations) > 1 else item.generations[0] for item in items
    ]
    version = generations[0].job.task.adapter_version
    response = pb.ModelInferResponse(model_name=task.spec.id, model_version=version, id=request.id)
    raw, labels = bool(request.raw_input_contents), task.spec.labels or ()
    shape = request.inputs[0].shape if task.spec.image is None else [len(generations)]
    for name in tensors.wanted(request, task.spec):
        if name == tensors.PROBABILITIES_OUTPUT:
            found = [dict(each.probabilities) for each in generations]
            tensors.write_numbers(response, name, [[each[label] for label in labels] for each in found], raw=raw)
        elif name == tensors.LABELS_OUTPUT:
            tensors.write_texts(response, name, labels, [len(labels)], raw=raw)
        else:
            tensors.write_texts(response, name, [each.answer for each in generations], shape, raw=raw)
    # Count all samples that were drawn, as usage does. An image's label has no working.
    call, drawn = current_call.get(), [each for item in items for each in item.generations]
    response.parameters["prompt_tokens"].int64_param = call.prompt_tokens
    response.parameters["cached_tokens"].int64_param = call.cached_tokens
    response.parameters["completion_tokens"].int64_param = call.completion_tokens
    response.parameters["working_tokens"].int64_param = sum(getattr(each, "working_tokens", 0) for each in drawn)
    return response


def _requests(request: pb.ModelInferRequest, task: ServedTask) -> list[native.GenerateRequest]:
    """The native request of every element. Raises INVALID_ARGUMENT with every violation."""
    names = tensors.input_names(task.spec)
    common = native.GenerateRequest(task_id=task.spec.id)
    if task.spec.defaults:
        # Outputs hold one answer per element, so refuse several samples.
        common.parameters.n = 1
    violations = list(parameters.apply(request.parameters, common, scored=tensors.scored(request)))
    try:
        texts = tensors.read_texts(request, names, tensors.output_names(task.spec))
    except tensors.TensorError as error:
        violations += error.violations
    if violations:
        raise invalid_argument(violations)
    made = []
    for values in zip(*(texts[name] for name in names), strict=True):
        one = native.GenerateRequest()
        one.CopyFrom(common)
        if names == (tensors.TEXT_INPUT,):
            one.text = values[0]
        else:
            one.fields.values.update(zip(names, values, strict=True))
        made.append(one)
    return made
