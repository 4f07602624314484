"""The Adapters service. Each method: authorise, decode, call the registry, encode."""

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import grpc
from mtlora_pb.v1 import adapters_pb2 as pb
from mtlora_pb.v1 import adapters_pb2_grpc

from server.call import current_call
from server.errors import RequestFailedError, Violation, invalid_argument, not_found, resource_exhausted, task_not_found
from server.registry.events import Event, WatcherTooSlowError
from server.registry.record import AdapterRecord
from server.registry.registry import NotPossibleError, Registry, UnknownAdapterError
from server.registry.uploads import Announced, Incoming, Uploads
from server.registry.version import AdapterVersion, NoRoomError, Stage, StageError, version_key
from server.registry.weights import MAX_WEIGHT
from server.scheduling.admission import Admission
from server.tenants.authentication import require_admin


class AdaptersServicer(adapters_pb2_grpc.AdaptersServicer):
    """For admins only. `registry` and `uploads` are set before admission opens."""

    registry: Registry
    uploads: Uploads

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def Load(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:
        self._admit()
        with statuses(request.adapter):
            version = await self.registry.load(_name(request), request.version)
        return pb.LoadAdapterResponse(serving=self._version(version, Stage.SERVING))

    async def Unload(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.UnloadAdapterResponse:
        self._admit()
        with statuses(request.adapter):
            await self.registry.unload(_name(request))
        return pb.UnloadAdapterResponse()

    async def Pin(self, request: pb.PinAdapterRequest, context: Any) -> pb.PinAdapterResponse:
        self._admit()
        with statuses(request.adapter):
            self.registry.pin(_name(request))
        return pb.PinAdapterResponse()

    async def Unpin(self, request: pb.UnpinAdapterRequest, context: Any) -> pb.UnpinAdapterResponse:
        self._admit()
        with statuses(request.adapter):
            self.registry.unpin(_name(request))
        return pb.UnpinAdapterResponse()

    async def Rollback(self, request: pb.RollbackAdapterRequest, context: Any) -> pb.RollbackAdapterResponse:
        self._admit()
        with statuses(request.adapter):
            version = await self.registry.rollback(_name(request))
        return pb.RollbackAdapterResponse(serving=self._version(version, Stage.SERVING))

    async def SetWeights(self, request: pb.SetAdapterWeightsRequest, context: Any) -> pb.SetAdapterWeightsResponse:
        self._admit()
        weights = _weights(request.weights)
        name = request.adapter
        if request.WhichOneof("target") == "task":
            task = self.registry.catalog.tasks.get(request.task)
            if task is None:
                raise task_not_found(request.task, self.registry.catalog.tasks)
            name = task.adapter_name
        elif not name:
            raise invalid_argument([Violation("target", "found none; allowed: one of adapter, task")])
        with statuses(name):
            await self.registry.set_weights(name, weights, request.task)
        return pb.SetAdapterWeightsResponse()

    async def List(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        self._admit()
        records = sorted(self.registry.records.items())
        return pb.ListAdaptersResponse(adapters=[self._adapter(record) for _, record in records])

    async def Upload(
        self, requests: AsyncIterator[pb.UploadAdapterRequest], context: Any
    ) -> AsyncIterator[pb.UploadAdapterResponse]:
        self._admit()
        first = await anext(requests)
        if first.WhichOneof("part") != "begin":
            raise invalid_argument([Violation("begin", "found none in the first message; allowed: begin")])
        begin = first.begin
        announced = Announced(begin.adapter, begin.content, begin.manifest_bytes, begin.tensors_bytes)
        upload = await self.uploads.begin(announced)
        try:
            yield pb.UploadAdapterResponse(received=upload.received, max_chunk_bytes=self.uploads.max_chunk_bytes)
            while not upload.whole:
                await self._write(upload, await anext(requests, None))
            with statuses(begin.adapter):
                version = upload.version or await upload.finish()
        finally:
            upload.leave()
        if audited := current_call.get().audited:
            audited.chose(version)
        yield pb.UploadAdapterResponse(received=upload.received, version=version)

    async def _write(self, upload: Incoming, message: pb.UploadAdapterRequest | None) -> None:
        if message is None:
            found = f"found the end after {upload.received} of {upload.announced.bytes} bytes"
            raise invalid_argument([Violation("chunk", f"{found}; allowed: all of them")])
        if message.WhichOneof("part") != "chunk":
            raise invalid_argument([Violation("chunk", "found none in a message after the first; allowed: chunk")])
        await upload.write(message.chunk.offset, message.chunk.data)

    async def Download(self, request: pb.DownloadAdapterRequest, context: Any) -> pb.DownloadAdapterResponse:
        self._admit()
        with statuses(request.adapter):
            version, manifest = await self.registry.manifest(_name(request), request.version)
        content = hashlib.sha256(manifest).hexdigest()
        return pb.DownloadAdapterResponse(version=version, manifest=manifest, content=content)

    async def Watch(self, request: pb.WatchAdaptersRequest, context: Any) -> AsyncIterator[pb.AdapterEvent]:
        self._admit()
        # Send the initial metadata now: it tells the client that it will see every later event.
        await context.send_initial_metadata(())
        try:
            async for event in self.registry.events.watch():
                if request.adapter in ("", event.name):
                    yield _event(event)
        except WatcherTooSlowError:
            raise resource_exhausted("events came faster than the client read them; call Watch again", 0.0) from None

    def _admit(self) -> None:
        require_admin(current_call.get().tenant)
        self._admission.check_serving()

    def _adapter(self, record: AdapterRecord) -> pb.Adapter:
        active = [self._version(version, Stage.SERVING) for version in record.active]
        # A version that is kept for a rollback may also be a canary.
        kept = [version for version in reversed(record.previous) if version not in record.active]
        before = [self._version(version, Stage.VERIFIED) for version in kept]
        known = {each.version for each in (*active, *before)}
        rest = []
        for name, version in sorted(record.found.items(), key=lambda item: version_key(item[0]), reverse=True):
            if version.stage is Stage.FAILED:
                rest.append(_message(name, Stage.FAILED, version.reason))
            elif name not in known:
                rest.append(_message(name, Stage.FOUND))
        return pb.Adapter(
            name=record.name,
            pinned=record.pinned,
            unloaded=record.unloaded,
            versions=[*active, *before, *rest],
            splits=[pb.AdapterSplit(task=task, weights=split) for task, split in sorted(record.weights.items())],
        )

    def _version(self, version: AdapterVersion, stage: Stage) -> pb.AdapterVersion:
        message = _message(version.version, stage)
        message.content = version.content
        message.resident = version.resident
        message.requests = version.holds
        message.tasks = len(version.slots)
        return message


def _message(version: str, stage: Stage, reason: str = "") -> pb.AdapterVersion:
    return pb.AdapterVersion(version=version, stage=_stage(stage), reason=reason)


def _event(event: Event) -> pb.AdapterEvent:
    message = pb.AdapterEvent(
        adapter=event.name,
        version=event.version,
        content=event.content,
        stage=_stage(event.stage),
        failed_stage=_stage(event.failed_stage) if event.failed_stage else None,
        reason=event.reason,
    )
    message.time.FromNanoseconds(int(event.time * 1e9))
    return message


def _stage(stage: Stage) -> Any:
    return pb.AdapterStage.Value(f"ADAPTER_STAGE_{stage.name}")


def _name(request: Any) -> str:
    if not request.adapter:
        raise invalid_argument([Violation("adapter", "found none; allowed: an adapter that List shows")])
    return str(request.adapter)


def _weights(weights: Mapping[str, int]) -> dict[str, int]:
    violations = [
        Violation(f"weights[{version}]", f"found {weight}; allowed: 0 to {MAX_WEIGHT}")
        for version, weight in weights.items()
        if weight > MAX_WEIGHT
    ]
    if weights and not any(weights.values()):
        violations.append(Violation("weights", "found only 0; allowed: one above 0, or no weights at all"))
    if violations:
        raise invalid_argument(violations)
    return {version: weight for version, weight in weights.items() if weight}


@contextmanager
def statuses(name: str) -> Iterator[None]:
    """Turn the registry's errors into statuses."""
    try:
        yield
    except UnknownAdapterError as error:
        raise not_found("mtlora.v1.Adapter", name, str(error)) from None
    except NotPossibleError as error:
        raise RequestFailedError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
    except NoRoomError as error:
        raise resource_exhausted(f"{name}: {error.reason}; in the engine: {', '.join(error.taken)}", 5.0) from None
    except StageError as error:
        message = f"{name}: not {error.stage.value}: {error.reason}"
        raise RequestFailedError(grpc.StatusCode.FAILED_PRECONDITION, message) from None
