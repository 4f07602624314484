"""The Usage service: tenants' usage, for admins only."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from mtlora_pb.v1 import usage_pb2 as pb
from mtlora_pb.v1 import usage_pb2_grpc

from server.accounting import Usage
from server.accounting.totals import Row
from server.call import current_call
from server.errors import Violation, invalid_argument
from server.tenants.authentication import require_admin

_GRANULARITIES = {
    pb.USAGE_GRANULARITY_UNSPECIFIED: "day",
    pb.USAGE_GRANULARITY_HOUR: "hour",
    pb.USAGE_GRANULARITY_DAY: "day",
    pb.USAGE_GRANULARITY_MONTH: "month",
    pb.USAGE_GRANULARITY_TOTAL: "total",
}


class UsageServicer(usage_pb2_grpc.UsageServicer):
    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    async def Read(self, request: pb.ReadUsageRequest, context: Any) -> AsyncIterator[pb.ReadUsageResponse]:
        require_admin(current_call.get().tenant)
        granularity = _GRANULARITIES.get(request.granularity)
        if granularity is None:
            raise invalid_argument([Violation("granularity", f"found {request.granularity}; allowed: 0 to 4")])
        since = request.since.seconds
        until = request.until.seconds if request.HasField("until") else int(time.time()) + 1
        if since > until:
            raise invalid_argument([Violation("until", f"found {until}, before since, {since}; allowed: after it")])
        first = Timestamp(seconds=await self._usage.counted_since())
        yield pb.ReadUsageResponse(counted_since=first, durable=self._usage.durable)
        read = self._usage.read(since, until, granularity, request.tenant or None, request.task or None)
        async with aclosing(read) as pages:
            async for page in pages:
                yield pb.ReadUsageResponse(sums=[_sum(row, granularity) for row in page])


def _sum(row: Row, granularity: str) -> pb.UsageSum:
    begins, tenant, task, counts = row
    return pb.UsageSum(
        begins=None if granularity == "total" else Timestamp(seconds=begins),
        tenant=tenant,
        task=task,
        requests=counts.requests,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        completion_tokens=counts.completion_tokens,
    )
