"""Fuzzed requests: the server must answer each with a proper status, and its memory must not grow."""

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message
from mtlora_pb.v1 import inference_pb2 as native
from openinference_pb import grpc_predict_v2_pb2 as oip

from benchmarks.harness.asking import closed_loop
from benchmarks.harness.processes import resident_bytes
from mtlora.client import MetricsPage
from server.cli.process import ServerProcess
from tests.faults._load import ask_many_lengths
from tests.faults._secured import what_is_left
from tests.faults._tenanted import tenanted
from tests.faults.scenario import Options, Row

ORDER = 55
_IN_FLIGHT = 32
# A call that its own deadline ends was hanging: the server had its whole message and enough time.
PROPER = {
    "OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "PERMISSION_DENIED",
    "UNIMPLEMENTED", "OUT_OF_RANGE",
}  # fmt: skip
_NATIVE, _OIP = "/mtlora.v1.Inference/", "/inference.GRPCInferenceService/"
METHODS: dict[str, type[Message]] = {
    f"{_NATIVE}Generate": native.GenerateRequest,
    f"{_NATIVE}GenerateStream": native.GenerateRequest,
    f"{_NATIVE}GenerateBatch": native.GenerateBatchRequest,
    f"{_NATIVE}GenerateBatchStream": native.GenerateBatchRequest,
    f"{_NATIVE}Analyze": native.AnalyzeRequest,
    f"{_NATIVE}AnalyzeStream": native.AnalyzeRequest,
    f"{_NATIVE}Score": native.ScoreRequest,
    f"{_NATIVE}ListTasks": native.ListTasksRequest,
    f"{_NATIVE}GetTask": native.GetTaskRequest,
    f"{_OIP}ModelInfer": oip.ModelInferRequest,
    f"{_OIP}ModelReady": oip.ModelReadyRequest,
    f"{_OIP}ModelMetadata": oip.ModelMetadataRequest,
    f"{_OIP}RepositoryIndex": oip.RepositoryIndexRequest,
    f"{_OIP}RepositoryModelLoad": oip.RepositoryModelLoadRequest,
    f"{_OIP}ServerMetadata": oip.ServerMetadataRequest,
}


def run(options: Options) -> Row:
    """Send 100,000 requests (short: 3,000) and measure the memory of every process before and after."""
    count = 100_000 if options.full else 3_000
    shared = tenanted(options)
    access, server = shared.set_tenants({"fuzzer": {}})["fuzzer"], shared.server
    with server.client(access) as client:
        fuzzer = Fuzzer(options.seed, str(access.api_key), [task.id for task in client.tasks()])
        ask_many_lengths(client)
    failed_before = _failed(server)
    # Warm up until caches are full and pools have their size.
    patience_s = shared.pace.patience_s
    asyncio.run(send(server.address, fuzzer, max(1_500, count // 20), patience_s))
    before = resident_bytes(server.process.pid)
    statuses = asyncio.run(send(server.address, fuzzer, count, patience_s))
    left = what_is_left(server)
    growth = resident_bytes(server.process.pid) / before - 1
    internal = _failed(server) - failed_before
    alive = server.process.poll() is None
    improper = set(statuses) - PROPER
    shown = ", ".join(f"{name} {n}" for name, n in statuses.most_common())
    return Row(
        "fuzzed requests",
        "no crash, RSS within 5 %, every reply a proper status",
        f"{sum(statuses.values())} requests ({shown}), RSS {growth:+.1%}" + (f", left: {left}" if left else ""),
        met=alive and not improper and not internal and not left and abs(growth) <= 0.05,
    )


def _failed(server: ServerProcess) -> float:
    page = MetricsPage.fetch(server.metrics)
    return sum(page.value("mtlora_requests_total", status=status) for status in ("INTERNAL", "UNKNOWN"))


class Fuzzer:
    """Makes requests: (method, metadata, bytes)."""

    def __init__(self, seed: int, key: str, task_ids: list[str]) -> None:
        self._rng = random.Random(seed)
        self._key = key
        self._task_ids = task_ids

    def request(self) -> tuple[str, tuple[tuple[str, str], ...], bytes]:
        rng = self._rng
        method = rng.choice(list(METHODS)) if rng.random() < 0.6 else f"{_NATIVE}Generate"
        message = METHODS[method]()
        self._fill(message)
        data = message.SerializeToString()
        match rng.randrange(4):
            case 0:
                data = rng.randbytes(rng.choice((1, 7, 100, 3000)))
            case 1:
                data = self._damage(data)
        return method, self._metadata(), data[:70_000]

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        rng = self._rng
        if rng.random() < 0.9:
            return (("authorization", f"Bearer {self._key}"), ("x-request-id", self._text()[:80].encode().hex()[:70]))
        junk = "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(0, 200)))
        # Some have a known key id, so that the server compares the secret too.
        return (("authorization", rng.choice(("", "Bearer ", f"Bearer {self._key[:20]}_")) + junk),)

    def _damage(self, data: bytes) -> bytes:
        rng, damaged = self._rng, bytearray(data)
        for _ in range(rng.randint(1, 8)):
            if not damaged:
                break
            at = rng.randrange(len(damaged))
            match rng.randrange(3):
                case 0:
                    damaged[at] = rng.randrange(256)
                case 1:
                    del damaged[at : at + rng.randint(1, 5)]
                case _:
                    damaged[at:at] = rng.randbytes(rng.randint(1, 5))
        return bytes(damaged)

    def _fill(self, message: Message, depth: int = 0) -> None:
        """Set fields at random, by the message's descriptor."""
        rng, fields = self._rng, message.DESCRIPTOR.fields
        # Set few of the many parameters, so that some requests are right.
        left_out = 0.3 if len(fields) < 15 else 0.9
        for field in fields:
            if rng.random() < left_out or depth > 4:
                continue
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                self._fill_map(getattr(message, field.name), field.message_type)
            elif field.message_type is not None:
                if field.is_repeated:
                    for _ in range(rng.choice((1, 1, 2, 5))):
                        self._fill(getattr(message, field.name).add(), depth + 1)
                else:
                    getattr(message, field.name).SetInParent()
                    self._fill(getattr(message, field.name), depth + 1)
            elif field.is_repeated:
                getattr(message, field.name).extend(self._value(field) for _ in range(rng.choice((0, 1, 2, 9))))
            else:
                setattr(message, field.name, self._value(field))

    def _fill_map(self, values: Any, entry: Any) -> None:
        key_field, value_field = entry.fields_by_name["key"], entry.fields_by_name["value"]
        for _ in range(self._rng.randint(0, 3)):
            key = self._text()[:20] if key_field.type == key_field.TYPE_STRING else self._value(key_field)
            if value_field.message_type is not None:
                self._fill(values[key], 3)
            else:
                values[key] = self._value(value_field)

    def _value(self, field: Any) -> Any:
        rng = self._rng
        kinds: dict[int, Callable[[], Any]] = {
            field.CPPTYPE_STRING: lambda: self._bytes() if field.type == field.TYPE_BYTES else self._string(field.name),
            field.CPPTYPE_BOOL: lambda: rng.random() < 0.5,
            field.CPPTYPE_FLOAT: self._float,
            field.CPPTYPE_DOUBLE: self._float,
            # Few tokens or impossibly many: long answers would take the time and find nothing.
            field.CPPTYPE_UINT32: lambda: rng.choice((0, 1, 2, 3, 5, 2000, 2**32 - 1)),
            field.CPPTYPE_UINT64: lambda: rng.choice((0, 1, 2**63, 2**64 - 1)),
            field.CPPTYPE_INT32: lambda: rng.choice((0, 1, -1, 2**31 - 1)),
            field.CPPTYPE_INT64: lambda: rng.choice((0, 1, 2, -1, 2**63 - 1, -(2**63))),
        }
        return kinds[field.cpp_type]()

    def _float(self) -> float:
        return self._rng.choice((0.0, 0.5, 1.0, 2.0, -1.0, 1e30, float("inf"), float("nan")))

    def _string(self, name: str) -> str:
        rng = self._rng
        if name in ("task_id", "model_name", "name") and rng.random() < 0.7:
            return rng.choice((*self._task_ids, "text_input", "text_output"))
        if name == "datatype" and rng.random() < 0.7:
            return "BYTES"
        if name == "role" and rng.random() < 0.7:
            return rng.choice(("system", "user", "assistant"))
        return self._text()

    def _text(self) -> str:
        rng = self._rng
        alphabet = rng.choice(("abc XYZ 0123\n", "\0\x01\x7f\t", "äß漢字🙂\u202e\ufeff", "{}%<|im_end|>#/..\\'\""))
        return "".join(rng.choice(alphabet) for _ in range(rng.choice((0, 1, 10, 100, 1000, 1000))))

    def _bytes(self) -> bytes:
        text = self._text().encode()
        return self._rng.choice((text, struct.pack("<I", len(text)) + text, self._rng.randbytes(20)))

    def garbage(self) -> bytes:
        """Bytes for a bare connection: no HTTP/2, or an HTTP/2 preface and noise."""
        rng = self._rng
        start = rng.choice((b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
        return start + rng.randbytes(rng.choice((0, 9, 100, 5000)))


async def send(address: str, fuzzer: Fuzzer, count: int, patience_s: float) -> Counter[str]:
    """Number of replies by status. patience_s: until a call is given up."""
    statuses: Counter[str] = Counter()

    async with grpc.aio.insecure_channel(address) as channel:

        async def one(number: int) -> None:
            if number % 100 == 0:
                await asyncio.to_thread(_break_in, address, fuzzer.garbage())
            method, metadata, data = fuzzer.request()
            statuses[await _status(channel, method, metadata, data, patience_s)] += 1

        await closed_loop(range(count), _IN_FLIGHT, one)
    return statuses


async def _status(channel: Any, method: str, metadata: Any, data: bytes, patience_s: float) -> str:
    try:
        if method.endswith("Stream"):
            async for _ in channel.unary_stream(method)(data, metadata=metadata, timeout=patience_s):
                pass
        else:
            await channel.unary_unary(method)(data, metadata=metadata, timeout=patience_s)
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


def _break_in(address: str, data: bytes) -> None:
    host, port = address.split(":")
    try:
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(data)
    except OSError:
        # The server may close the connection first.
        return
