"""What tenants used, as the server sends it."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

from mtlora_pb.v1 import usage_pb2


class UsageReport:
    """The sums as they come: a Client's for `for`, an AsyncClient's for `async for`.

    Usage before `counted_since` (UTC) was not counted, and ends with the server's process unless `durable`.
    """

    def __init__(self, first: usage_pb2.ReadUsageResponse, messages: Any) -> None:
        self._messages = messages
        self.counted_since: datetime = first.counted_since.ToDatetime(UTC)
        self.durable: bool = first.durable

    def __iter__(self) -> Iterator[usage_pb2.UsageSum]:
        for message in self._messages:
            yield from message.sums

    async def __aiter__(self) -> AsyncIterator[usage_pb2.UsageSum]:
        async for message in self._messages:
            for each in message.sums:
                yield each
