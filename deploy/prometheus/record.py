"""Record what a real server exports under overload, for the tests of the rules: `python -m deploy.prometheus.record`.

The server has its default settings. A closed loop of 200 requests, a tenth by the Open Inference Protocol with a
deadline of a second, runs for a minute; /metrics is read every five seconds. Writes `overload.yaml`.
"""

import argparse
import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import grpc
import yaml
from openinference_pb import grpc_predict_v2_pb2 as pb
from openinference_pb import grpc_predict_v2_pb2_grpc

from benchmarks.harness.native_server import native_server
from mtlora.client import AsyncClient, MetricsPage, ServerError

FILE = Path(__file__).with_name("overload.yaml")
SECONDS, INTERVAL_S = 60, 5
IN_FLIGHT, OPEN_INFERENCE = 200, 20
_GAUGES = (
    "mtlora_serving", "mtlora_requests_in_flight", "mtlora_requests_queued", "mtlora_engine_running_sequences",
    "mtlora_engine_waiting_sequences",
)  # fmt: skip
# Summed over their other labels.
_SUMS = {
    "mtlora_requests_total": ("method", "status"),
    "mtlora_shed_requests_total": ("tenant", "reason"),
    "mtlora_time_to_first_token_seconds_bucket": ("le",),
}


def recorded(page: MetricsPage) -> dict[str, float]:
    """The recorded series of one metrics page."""
    found: dict[str, float] = defaultdict(float)
    for gauge in _GAUGES:
        found[gauge] = page.value(gauge)
    for name, kept in _SUMS.items():
        for labels, value in page.samples.get(name, ()):
            shown = ",".join(f'{label}="{labels[label]}"' for label in kept)
            found[f"{name}{{{shown}}}"] += value
    return found


async def _flood(address: str, task: str, until: float) -> None:
    numbers = itertools.count()

    async def native(client: AsyncClient) -> None:
        while time.monotonic() < until:
            try:
                await client.generate(task, f"7/30/{1900 + next(numbers)}", max_new_tokens=32, stop=[])
            except ServerError:
                await asyncio.sleep(0.1)

    async def open_inference(stub: grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub) -> None:
        while time.monotonic() < until:
            request = pb.ModelInferRequest(model_name=task)
            tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(f"7/30/{1900 + next(numbers)}".encode())
            try:
                await stub.ModelInfer(request, timeout=1.0)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)

    async with AsyncClient(address, retry=None) as client, grpc.aio.insecure_channel(address) as channel:
        stub = grpc_predict_v2_pb2_grpc.GRPCInferenceServiceStub(channel)
        await asyncio.gather(
            *(native(client) for _ in range(IN_FLIGHT - OPEN_INFERENCE)),
            *(open_inference(stub) for _ in range(OPEN_INFERENCE)),
        )


async def _record(address: str, metrics: str, task: str) -> dict[str, list[float]]:
    flood = asyncio.create_task(_flood(address, task, time.monotonic() + SECONDS + INTERVAL_S))
    pages = []
    for _ in range(SECONDS // INTERVAL_S):
        await asyncio.sleep(INTERVAL_S)
        pages.append(recorded(await asyncio.to_thread(MetricsPage.fetch, metrics)))
    await flood
    return {name: [each.get(name, 0.0) for each in pages] for name in sorted(set().union(*pages))}


def main(argv: Sequence[str] | None = None) -> int:
    """Record, write the file, print where it is."""
    parser = argparse.ArgumentParser(prog="python -m deploy.prometheus.record", description=__doc__)
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--task", default="date_normalisation")
    options = parser.parse_args(argv)
    with native_server(backbone="default", adapters=options.adapters, log_level="warning") as server:
        series = asyncio.run(_record(server.address, server.metrics, options.task))
    head = f"# {__doc__.splitlines()[0]}\n" if __doc__ else ""
    FILE.write_text(head + yaml.safe_dump({"interval_s": INTERVAL_S, "series": series}, default_flow_style=None))
    print(FILE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
