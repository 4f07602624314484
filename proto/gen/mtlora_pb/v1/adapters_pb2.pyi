import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterStage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STAGE_UNSPECIFIED: _ClassVar[AdapterStage]
    ADAPTER_STAGE_FOUND: _ClassVar[AdapterStage]
    ADAPTER_STAGE_VERIFIED: _ClassVar[AdapterStage]
    ADAPTER_STAGE_LOADED: _ClassVar[AdapterStage]
    ADAPTER_STAGE_WARMED: _ClassVar[AdapterStage]
    ADAPTER_STAGE_SERVING: _ClassVar[AdapterStage]
    ADAPTER_STAGE_DRAINED: _ClassVar[AdapterStage]
    ADAPTER_STAGE_FAILED: _ClassVar[AdapterStage]
    ADAPTER_STAGE_VANISHED: _ClassVar[AdapterStage]
    ADAPTER_STAGE_UNLOADED: _ClassVar[AdapterStage]
ADAPTER_STAGE_UNSPECIFIED: AdapterStage
ADAPTER_STAGE_FOUND: AdapterStage
ADAPTER_STAGE_VERIFIED: AdapterStage
ADAPTER_STAGE_LOADED: AdapterStage
ADAPTER_STAGE_WARMED: AdapterStage
ADAPTER_STAGE_SERVING: AdapterStage
ADAPTER_STAGE_DRAINED: AdapterStage
ADAPTER_STAGE_FAILED: AdapterStage
ADAPTER_STAGE_VANISHED: AdapterStage
ADAPTER_STAGE_UNLOADED: AdapterStage

class LoadAdapterRequest(_message.Message):
    __slots__ = ("adapter", "version")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    version: str
    def __init__(self, adapter: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("serving",)
    SERVING_FIELD_NUMBER: _ClassVar[int]
    serving: AdapterVersion
    def __init__(self, serving: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class PinAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnpinAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class UnpinAdapterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class RollbackAdapterResponse(_message.Message):
    __slots__ = ("serving",)
    SERVING_FIELD_NUMBER: _ClassVar[int]
    serving: AdapterVersion
    def __init__(self, serving: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class SetAdapterWeightsRequest(_message.Message):
    __slots__ = ("adapter", "task", "weights")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    task: str
    weights: _containers.ScalarMap[str, int]
    def __init__(self, adapter: _Optional[str] = ..., task: _Optional[str] = ..., weights: _Optional[_Mapping[str, int]] = ...) -> None: ...

class SetAdapterWeightsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("begin", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: UploadBegin
    chunk: UploadChunk
    def __init__(self, begin: _Optional[_Union[UploadBegin, _Mapping]] = ..., chunk: _Optional[_Union[UploadChunk, _Mapping]] = ...) -> None: ...

class UploadBegin(_message.Message):
    __slots__ = ("adapter", "content", "manifest_bytes", "tensors_bytes")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_BYTES_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    content: str
    manifest_bytes: int
    tensors_bytes: int
    def __init__(self, adapter: _Optional[str] = ..., content: _Optional[str] = ..., manifest_bytes: _Optional[int] = ..., tensors_bytes: _Optional[int] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadAdapterResponse(_message.Message):
    __slots__ = ("received", "version", "max_chunk_bytes")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    received: int
    version: str
    max_chunk_bytes: int
    def __init__(self, received: _Optional[int] = ..., version: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ...) -> None: ...

class DownloadAdapterRequest(_message.Message):
    __slots__ = ("adapter", "version")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    version: str
    def __init__(self, adapter: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class DownloadAdapterResponse(_message.Message):
    __slots__ = ("version", "manifest", "content")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    version: str
    manifest: bytes
    content: str
    def __init__(self, version: _Optional[str] = ..., manifest: _Optional[bytes] = ..., content: _Optional[str] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "pinned", "unloaded", "versions", "splits")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    UNLOADED_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    unloaded: bool
    versions: _containers.RepeatedCompositeFieldContainer[AdapterVersion]
    splits: _containers.RepeatedCompositeFieldContainer[AdapterSplit]
    def __init__(self, name: _Optional[str] = ..., pinned: _Optional[bool] = ..., unloaded: _Optional[bool] = ..., versions: _Optional[_Iterable[_Union[AdapterVersion, _Mapping]]] = ..., splits: _Optional[_Iterable[_Union[AdapterSplit, _Mapping]]] = ...) -> None: ...

class AdapterVersion(_message.Message):
    __slots__ = ("version", "stage", "content", "resident", "requests", "tasks", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: str
    stage: AdapterStage
    content: str
    resident: bool
    requests: int
    tasks: int
    reason: str
    def __init__(self, version: _Optional[str] = ..., stage: _Optional[_Union[AdapterStage, str]] = ..., content: _Optional[str] = ..., resident: _Optional[bool] = ..., requests: _Optional[int] = ..., tasks: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AdapterSplit(_message.Message):
    __slots__ = ("task", "weights")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    task: str
    weights: _containers.ScalarMap[str, int]
    def __init__(self, task: _Optional[str] = ..., weights: _Optional[_Mapping[str, int]] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class AdapterEvent(_message.Message):
    __slots__ = ("time", "adapter", "version", "content", "stage", "failed_stage", "reason")
    TIME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    FAILED_STAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    adapter: str
    version: str
    content: str
    stage: AdapterStage
    failed_stage: AdapterStage
    reason: str
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., adapter: _Optional[str] = ..., version: _Optional[str] = ..., content: _Optional[str] = ..., stage: _Optional[_Union[AdapterStage, str]] = ..., failed_stage: _Optional[_Union[AdapterStage, str]] = ..., reason: _Optional[str] = ...) -> None: ...
