"""The server's life: listen, start the engine, serve, drain, stop."""

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from mtlora_pb.v1 import inference_pb2, inference_pb2_grpc
from openinference_pb import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc

from mtlora.backbone import BackboneError, identify, resolve
from server.admission import Admission, State
from server.catalog import Catalog, read_catalog
from server.engine import Engine, EngineStartError, exit_at_once
from server.errors import EngineDeadError
from server.interceptor import CallInterceptor
from server.listening import Listening
from server.logs import get_logger
from server.metrics import UNKNOWN_TASK, Metrics
from server.openinference import OpenInferenceServicer
from server.scheduling import Scheduler
from server.scheduling.scheduler import engine_slots
from server.servicer import InferenceServicer
from server.settings import Settings
from server.tenants import Directory, Tenants, TenantsError
from server.tenants.authentication import Authenticator
from server.tls import TLSError
from server.validation import Limits

logger = get_logger("app")

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_OPEN_INFERENCE = grpc_predict_v2_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_WATCH_INTERVAL_S = 1.0


class StartError(Exception):
    """The server cannot start; the message says why."""


class App:
    """One server process: `run` it once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        slots = min(engine_slots(settings.max_num_seqs), settings.in_flight_limit)
        # The queue is full before this is: which tenant is refused then is a matter of fairness.
        self._admission = Admission(settings.in_flight_limit + slots, self._metrics.in_flight.set)
        self._scheduler = Scheduler(
            slots, max(1, settings.in_flight_limit - slots), on_service=self._metrics.record_service
        )
        self._metrics.queued.set_function(lambda: self._scheduler.load.queued)
        try:
            self._directory = Directory(
                settings.tenants, on_change=self._on_tenants, on_failure=self._metrics.tenants_refused.inc
            )
        except TenantsError as error:
            raise StartError(str(error)) from None
        self._on_tenants(self._directory.current)
        self._servicer = InferenceServicer(
            self._admission,
            self._metrics,
            self._scheduler,
            cache_salt=lambda tenant: self._directory.current.cache_salt(tenant),
            log_prompts=settings.log_prompts,
        )
        self._open_inference = OpenInferenceServicer(self._servicer, self._admission)
        self._health = HealthServicer()
        self._engine: Engine | None = None
        self._stop = asyncio.Event()

    async def run(self, ready: Callable[[str], None]) -> int:
        """Serve until a signal; returns the exit status. `ready` gets the ready line once requests are served."""
        self._handle_signals()
        await self._set_health(serving=False)
        try:
            server, address = await self._listen()
            try:
                await self._serve(address, ready)
            finally:
                await server.stop(grace=1.0)
        except StartError as error:
            print(f"mtlora-server: {error}", file=sys.stderr, flush=True)
            if self._engine is None:
                return 1
            exit_at_once(1)
        return 0

    async def _serve(self, address: str, ready: Callable[[str], None]) -> None:
        began = time.monotonic()
        metrics_port, close_metrics = self._open_metrics()
        logger.info("listening", extra={"fields": {"address": address, "metrics_port": metrics_port}})
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            logger.info("stopped while starting")
            exit_at_once(0)
        engine = starting.result()
        await self._open_admission()
        seconds = round(time.monotonic() - began, 1)
        tasks = len(self._servicer.catalog.tasks)
        logger.info("serving", extra={"fields": {"address": address, "tasks": tasks, "start_seconds": seconds}})
        ready(f"serving on {address}, metrics on {self._settings.metrics_host}:{metrics_port}, {tasks} tasks")
        watching = asyncio.create_task(self._watch(engine))
        reloading = asyncio.create_task(self._directory.watch())
        await stopping
        watching.cancel()
        reloading.cancel()
        await self._drain()
        close_metrics()
        engine.shutdown()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("second signal, exiting at once")
            exit_at_once(128 + number)
        logger.info("stopping", extra={"fields": {"signal": signal.Signals(number).name}})
        self._stop.set()

    async def _listen(self) -> tuple[Any, str]:
        interceptor = CallInterceptor(
            self._metrics,
            self._task_label,
            Authenticator(self._directory).tenant,
            slow_reader_s=self._settings.slow_reader_s,
        )
        try:
            listening = Listening(self._settings, interceptor)
        except TLSError as error:
            raise StartError(str(error)) from None
        server = listening.server
        inference_pb2_grpc.add_InferenceServicer_to_server(self._servicer, server)
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._open_inference, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = (_SERVICE, _OPEN_INFERENCE, _HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server)
        try:
            address = listening.bind()
        except OSError as error:
            await server.stop(None)
            raise StartError(str(error)) from None
        await server.start()
        return server, address

    def _open_metrics(self) -> tuple[int, Callable[[], None]]:
        host, port = self._settings.metrics_host, self._settings.metrics_port
        try:
            return self._metrics.serve(host, port)
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error} (metrics_host, metrics_port)") from None

    async def _start(self) -> Engine:
        """Start the engine and, meanwhile, verify the adapters; then load them and warm up."""
        try:
            backbone = await asyncio.to_thread(resolve, self._settings.backbone)
            self._metrics.record_build(self._settings.backbone)
            engine = self._engine = Engine(self._settings, backbone, self._metrics.record_engine)
            _, catalog = await asyncio.gather(
                asyncio.to_thread(engine.start), asyncio.to_thread(self._read_catalog, backbone)
            )
        except (BackboneError, EngineStartError) as error:
            raise StartError(str(error)) from error
        self._set_catalog(await self._load_slots(engine, catalog))
        self._servicer.engine = engine
        self._servicer.tokenizer = engine.tokenizer
        self._servicer.limits = Limits(self._settings.max_model_len, engine.vocab_size)
        try:
            await engine.warm_up(next((task.slot for task in self._servicer.catalog.tasks.values()), None))
        except EngineDeadError:
            raise StartError("the engine died while it warmed up; the log above says why") from None
        return engine

    def _read_catalog(self, backbone: Path) -> Catalog:
        if self._settings.adapters is None:
            return Catalog()
        from mtlora.vllm_plugin.requests import slot_requests

        catalog = read_catalog(self._settings.adapters, identify(backbone), slot_requests)
        self._metrics.record_catalog(catalog)
        self._check_catalog(catalog)
        return catalog

    async def _load_slots(self, engine: Engine, catalog: Catalog) -> Catalog:
        """The catalog of those adapters that the engine took."""
        for adapter in catalog.adapters:
            try:
                for slot in adapter.slots:
                    await engine.load(slot)
            except Exception as error:
                if not engine.alive:
                    raise StartError(f"the engine died while it loaded {adapter.name}/{adapter.version}") from error
                catalog = catalog.without(adapter, f"the engine did not take it: {error}")
        self._check_catalog(catalog)
        return catalog

    def _check_catalog(self, catalog: Catalog) -> None:
        if not catalog.tasks and not self._settings.allow_no_tasks:
            raise StartError(f"{self._settings.adapters}: no adapter there can be served; the log above says why")

    def _set_catalog(self, catalog: Catalog) -> None:
        self._servicer.catalog = catalog
        self._metrics.record_catalog(catalog)

    def _on_tenants(self, tenants: Tenants) -> None:
        self._metrics.tenants.set(len(tenants.by_id))
        self._scheduler.keep_only(tenants.by_id.keys())

    def _task_label(self, task_id: str) -> str:
        return task_id if task_id in self._servicer.catalog.tasks else UNKNOWN_TASK

    async def _open_admission(self) -> None:
        # What is alive now stays: leave it out of garbage collections, which would hold up the streams.
        gc.collect()
        gc.freeze()
        self._admission.state = State.SERVING
        await self._set_health(serving=True)

    async def _watch(self, engine: Engine) -> None:
        """Stop serving when the engine dies."""
        while engine.alive:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        logger.error("the engine has died")
        self._admission.state = State.DEAD
        await self._set_health(serving=False)

    async def _drain(self) -> None:
        """Admit nothing more; let running requests finish, for as long as the grace period is."""
        self._admission.state = State.DRAINING
        await self._set_health(serving=False)
        if not await self._admission.drained(self._settings.grace_period_s):
            logger.warning("grace period over, aborting running requests")
            self._admission.abort_running()
            await self._admission.drained(5.0)
        logger.info("drained")

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self._metrics.serving.set(serving)
        for service in ("", _SERVICE):
            await self._health.set(service, status)


def serve(settings: Settings, ready: Callable[[str], None]) -> int:
    """Run a server in this process; returns its exit status."""
    return asyncio.run(_run(settings, ready))


async def _run(settings: Settings, ready: Callable[[str], None]) -> int:
    try:
        app = App(settings)
    except StartError as error:
        print(f"mtlora-server: {error}", file=sys.stderr, flush=True)
        return 1
    return await app.run(ready)
