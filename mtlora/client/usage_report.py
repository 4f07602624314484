"""Tenants' usage in the order in which the server sends it."""

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

from mtlora_pb.v1 import usage_pb2


class UsageReport:
    """Iterates over the sums: with `for` from a Client, with `async for` from an AsyncClient.

    Usage before `counted_since` (UTC) is missing. Counts are lost when the server's process ends, unless `durable`.
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
