"""Turns a checkpoint's files into the messages of an upload."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from mtlora_pb.v1 import adapters_pb2 as pb

from mtlora.client.retry import Attempts

# File names of checkpoint format 1, repeated here because `mtlora.checkpoint` imports torch and the client must not.
_FILES = ("adapter.json", "adapter.safetensors")
_CHUNK_BYTES = 256 << 10


class Upload:
    """One checkpoint for one adapter. Raises OSError if its files cannot be read."""

    def __init__(self, folder: Path | str, adapter: str) -> None:
        self._paths = [Path(folder, name) for name in _FILES]
        self._sizes = [path.stat().st_size for path in self._paths]
        self._adapter = adapter
        self._received = 0
        self._content = hashlib.sha256(self._paths[0].read_bytes()).hexdigest()

    def note(self, reply: pb.UploadAdapterResponse, attempts: Attempts) -> None:
        """Store the position up to which the server has received data."""
        if reply.received > self._received:
            self._received = reply.received
            attempts.got_on()

    @property
    def bytes(self) -> int:
        """Total bytes of both files."""
        return sum(self._sizes)

    def begin(self) -> pb.UploadAdapterRequest:
        """The first message."""
        manifest_bytes, tensors_bytes = self._sizes
        return pb.UploadAdapterRequest(
            begin=pb.UploadBegin(
                adapter=self._adapter, content=self._content, manifest_bytes=manifest_bytes, tensors_bytes=tensors_bytes
            )
        )

    def chunks(self, reply: pb.UploadAdapterResponse) -> Iterator[pb.UploadAdapterRequest]:
        """The later messages, starting at the server's position."""
        offset, most = reply.received, min(_CHUNK_BYTES, reply.max_chunk_bytes)
        begin = 0
        for path, size in zip(self._paths, self._sizes, strict=True):
            with path.open("rb") as file:
                file.seek(max(0, offset - begin))
                while offset < begin + size and (data := file.read(most)):
                    yield pb.UploadAdapterRequest(chunk=pb.UploadChunk(offset=offset, data=data))
                    offset += len(data)
            begin += size
