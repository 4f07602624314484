"""The server's life: listen, start the engine, serve, drain, stop."""

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from mtlora_pb.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from openinference_pb import grpc_predict_v2_pb2, grpc_predict_v2_pb2_grpc

from mtlora.backbone import BackboneError, resolve
from server.call import current_call
from server.engine import (
    Engine,
    EngineFailure,
    EngineGaveUpError,
    EngineStartError,
    Supervisor,
    begin_imports,
    exit_at_once,
)
from server.errors import EngineDeadError
from server.registry.adapters import Adapters, open_adapters
from server.registry.catalog import Catalog
from server.registry.leasing import LeasingEngine
from server.rpc.adapters_service import AdaptersServicer
from server.rpc.health import Health
from server.rpc.inference_service import InferenceServicer
from server.rpc.interceptor import CallInterceptor
from server.rpc.listening import Listening
from server.rpc.openinference import OpenInferenceServicer, RegistryRepository
from server.rpc.tls import TLSError
from server.rpc.validation import Limits
from server.scheduling import Scheduler
from server.scheduling.admission import Admission, State
from server.scheduling.scheduler import engine_slots
from server.settings import Settings
from server.telemetry.logs import finish_logging, get_logger
from server.telemetry.loop_delay import watch_loop
from server.telemetry.metrics import UNKNOWN_TASK, Metrics
from server.telemetry.tracing import Tracer
from server.tenants import Directory, Tenants, TenantsError
from server.tenants.authentication import Authenticator, require_admin

logger = get_logger("app")

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_OPEN_INFERENCE = grpc_predict_v2_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_ADAPTERS_SERVICE = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_POLL_INTERVAL_S = 5.0


class StartError(Exception):
    """The server cannot start; the message says why."""


class App:
    """One server process: `run` it once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics(exemplars=settings.metrics_exemplars)
        self._tracer = (
            Tracer(settings.otlp_endpoint, sample_ratio=settings.trace_sample_ratio) if settings.otlp_endpoint else None
        )
        slots = min(engine_slots(settings.max_num_seqs), settings.in_flight_limit)
        # The queue is full before this is: which tenant is refused then is a matter of fairness.
        self._admission = Admission(
            settings.in_flight_limit + slots,
            on_change=self._metrics.in_flight.set,
            on_full=lambda: self._metrics.record_shed(current_call().tenant.id, "in_flight"),
        )
        self._scheduler = Scheduler(slots, max(1, settings.in_flight_limit - slots), observer=self._metrics)
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
        self._adapters_servicer = AdaptersServicer(self._admission.check_serving, _authorize_admin)
        self._open_inference = OpenInferenceServicer(
            self._servicer, self._admission, RegistryRepository(lambda: self._adapters_servicer.registry)
        )
        self._health = Health(_SERVICE)
        self._supervisor: Supervisor | None = None
        self._adapters: Adapters | None = None
        self._verifying: asyncio.Future[None] | None = None
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
                if self._tracer:
                    await asyncio.to_thread(self._tracer.close)
        except StartError as error:
            _print_error(error)
            self._exit(1)
        return 0

    async def _serve(self, address: str, ready: Callable[[str], None]) -> None:
        began = time.monotonic()
        metrics_port, close_metrics = self._open_metrics()
        probed = await self._listen_for_probes()
        logger.info("listening", extra={"fields": {"address": address, "metrics_port": metrics_port}})
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            logger.info("stopped while starting")
            self._exit(0)
        starting.result()
        seconds = round(time.monotonic() - began, 1)
        tasks = len(self._servicer.catalog.tasks)
        logger.info("serving", extra={"fields": {"address": address, "tasks": tasks, "start_seconds": seconds}})
        ready(f"serving on {address}, metrics on {self._settings.metrics_host}:{metrics_port}, {tasks} tasks")
        work = (
            self._supervise(),
            self._follow_adapters(),
            self._directory.watch(),
            self._poll_workers(),
            watch_loop(self._metrics.loop_delay.observe),
        )
        working = [asyncio.create_task(each) for each in work]
        await stopping
        await self._drain()
        for task in working:
            task.cancel()
        close_metrics()
        if probed:
            await probed.stop(None)
        self._shut_down()

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("second signal, exiting at once")
            self._exit(128 + number)
        logger.info("stopping", extra={"fields": {"signal": signal.Signals(number).name}})
        self._stop.set()

    async def _listen(self) -> tuple[Any, str]:
        interceptor = CallInterceptor(
            self._metrics,
            self._task_label,
            Authenticator(self._directory).tenant,
            self._tracer,
            slow_reader_s=self._settings.slow_reader_s,
        )
        try:
            listening = Listening(self._settings, interceptor)
        except TLSError as error:
            raise StartError(str(error)) from None
        server = listening.server
        inference_pb2_grpc.add_InferenceServicer_to_server(self._servicer, server)
        adapters_pb2_grpc.add_AdaptersServicer_to_server(self._adapters_servicer, server)
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._open_inference, server)
        self._health.add_to(server)
        services = (_SERVICE, _ADAPTERS_SERVICE, _OPEN_INFERENCE, _HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server)
        try:
            address = listening.bind()
        except OSError as error:
            await server.stop(None)
            raise StartError(str(error)) from None
        await server.start()
        return server, address

    async def _listen_for_probes(self) -> Any | None:
        host, port = self._settings.host, self._settings.health_port
        if port is None:
            return None
        server, bound = await self._health.listen(host, port)
        if not bound:
            raise StartError(f"cannot listen on {host}:{port}: taken, or not an address of this machine (health_port)")
        return server

    def _open_metrics(self) -> tuple[int, Callable[[], None]]:
        host, port = self._settings.metrics_host, self._settings.metrics_port
        try:
            return self._metrics.serve(host, port)
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port}: {error} (metrics_host, metrics_port)") from None

    async def _start(self) -> None:
        """Start the engine and, meanwhile, verify the adapters; then load them and open the admission."""
        settings = self._settings
        begin_imports(settings)
        try:
            backbone = await asyncio.to_thread(resolve, settings.backbone)
            self._metrics.record_build(settings.backbone)
            supervisor = self._supervisor = Supervisor(
                lambda: Engine(settings, backbone, self._metrics.record_engine),
                self,
                hang_s=settings.engine_hang_s,
                max_failures=settings.engine_max_failures,
                window_s=settings.engine_failure_window_s,
            )
            self._adapters = await asyncio.to_thread(
                open_adapters, settings, backbone, supervisor, self._metrics, self._set_catalog
            )
            self._servicer.engine = LeasingEngine(supervisor, self._adapters.residency)
            self._adapters_servicer.registry = self._adapters.registry
            self._verifying = asyncio.ensure_future(self._verify_adapters())
            # Together: where nothing can be served, nobody waits for the engine to find out.
            await asyncio.gather(supervisor.start(), self._verifying)
        except (BackboneError, EngineStartError) as error:
            raise StartError(str(error)) from error
        except EngineDeadError:
            raise StartError("the engine died while it loaded its adapters; the log above says why") from None

    async def _verify_adapters(self) -> None:
        assert self._adapters is not None
        await self._adapters.registry.verify_all()
        self._check_catalog()

    def _check_catalog(self) -> None:
        if not self._servicer.catalog.tasks and not self._settings.allow_no_tasks:
            raise StartError(f"{self._settings.adapters}: no adapter there can be served; the log above says why")

    async def engine_started(self, engine: Engine) -> None:
        """An engine runs, with nothing loaded: load what served, and serve."""
        assert self._adapters is not None
        assert self._verifying is not None
        assert self._supervisor is not None
        await self._verifying
        self._servicer.tokenizer = engine.tokenizer
        self._servicer.limits = Limits(self._settings.max_model_len, engine.vocab_size)
        await self._adapters.registry.load_all()
        if self._admission.state is State.STARTING:
            self._check_catalog()
        resident = self._adapters.residency.resident
        await self._supervisor.warm_up(resident[-1].distinct_slots[0] if resident else None)
        await self._open_admission()

    async def engine_lost(self, failure: EngineFailure) -> None:
        """Serve nothing until another engine runs."""
        assert self._adapters is not None
        if not self._stop.is_set():
            self._admission.state = State.RESTARTING
        await self._set_health(serving=False)
        self._metrics.record_engine_restart(failure.kind)
        self._adapters.residency.reset()

    async def _supervise(self) -> None:
        assert self._supervisor is not None
        try:
            await self._supervisor.run()
        except EngineGaveUpError as error:
            logger.error("giving up", extra={"fields": {"reason": str(error)}})
            _print_error(error)
            await self._set_health(serving=False, live=False)
            # Long enough for the requests that ran to get their status.
            await asyncio.sleep(0.5)
            self._exit(1)
        except Exception:
            logger.error("the engine is not supervised any more", exc_info=True)
            self._exit(1)

    async def _poll_workers(self) -> None:
        """Keep the metrics of the engine's processes, and of what they hold, up to date, whichever engine runs."""
        assert self._supervisor is not None
        assert self._adapters is not None
        while True:
            self._metrics.adapters_resident.set(len(self._adapters.residency.resident))
            engine = self._supervisor.engine
            if engine is not None and engine.alive and not self._supervisor.starting:
                try:
                    self._metrics.record_workers(await engine.worker_stats())
                    self._metrics.record_between_steps(await engine.between_steps())
                except Exception as error:
                    # A dying engine is the supervisor's concern; metrics alone end nothing.
                    logger.warning("no statistics from the engine", extra={"fields": {"reason": str(error)}})
            await asyncio.sleep(_POLL_INTERVAL_S)

    async def _follow_adapters(self) -> None:
        assert self._adapters is not None
        try:
            await self._adapters.registry.run(self._settings.adapters_poll_s)
        except Exception:
            logger.error("adapters are not followed any more", exc_info=True)

    def _shut_down(self) -> None:
        assert self._adapters is not None
        assert self._supervisor is not None
        if self._supervisor.starting:
            self._exit(0)
        self._adapters.close()
        if self._supervisor.engine is not None:
            self._supervisor.engine.shutdown()
        # At the interpreter's exit some bindings count what is left, and say so.
        gc.unfreeze()

    def _exit(self, status: int) -> None:
        """End at once, whatever runs."""
        if self._adapters is not None:
            self._adapters.close()
        finish_logging()
        exit_at_once(status)

    def _set_catalog(self, catalog: Catalog) -> None:
        self._servicer.catalog = catalog
        self._metrics.record_catalog(catalog)

    def _on_tenants(self, tenants: Tenants) -> None:
        self._metrics.tenants.set(len(tenants.by_id))
        self._scheduler.keep_only(tenants.by_id.keys())

    def _task_label(self, task_id: str) -> str:
        return task_id if task_id in self._servicer.catalog.tasks else UNKNOWN_TASK

    async def _open_admission(self) -> None:
        if self._stop.is_set():
            return
        # What is alive now stays: leave it out of garbage collections, which would hold up the streams. The second one
        # tells the collector how little is left: full ones wait for a quarter of what the last one found alive.
        gc.collect()
        gc.freeze()
        gc.collect()
        self._admission.state = State.SERVING
        await self._set_health(serving=True)

    async def _drain(self) -> None:
        """Admit nothing more; let running requests finish, for as long as the grace period is."""
        self._admission.state = State.DRAINING
        await self._set_health(serving=False)
        if not await self._admission.drained(self._settings.grace_period_s):
            logger.warning("grace period over, aborting running requests")
            self._admission.abort_running()
            await self._admission.drained(5.0)
        logger.info("drained")

    async def _set_health(self, *, serving: bool, live: bool = True) -> None:
        self._metrics.serving.set(serving)
        await self._health.set(serving=serving, live=live)


def serve(settings: Settings, ready: Callable[[str], None]) -> int:
    """Run a server in this process; returns its exit status."""
    return asyncio.run(_run(settings, ready))


async def _authorize_admin(context: Any) -> None:
    require_admin(current_call().tenant)


async def _run(settings: Settings, ready: Callable[[str], None]) -> int:
    try:
        app = App(settings)
    except StartError as error:
        _print_error(error)
        return 1
    return await app.run(ready)


def _print_error(error: Exception) -> None:
    # It may refer to the log above it.
    if finish_logging():
        print(f"mtlora-server: {error}", file=sys.stderr, flush=True)
