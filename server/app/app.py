"""The life of a server: listen, start the engines, serve, drain, stop."""

import asyncio
import contextlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import uvloop

from mtlora.backbone import resolve
from mtlora.errors import BackboneError
from server.accounting import AuditError, AuditLog, Usage, UsageError
from server.app.engines import Engines, StartError
from server.engine import EngineGaveUpError, EngineStartError, check_machine, exit_at_once
from server.errors import EngineDeadError
from server.job import Lane
from server.registry.adapters import open_adapters
from server.registry.catalog import Catalog
from server.registry.spool import SpoolError
from server.rpc.adapters_service import AdaptersServicer
from server.rpc.anonymous import AnonymousCalls, AnonymousInterceptor
from server.rpc.documents import Documents
from server.rpc.health import Health
from server.rpc.inference_service import InferenceServicer
from server.rpc.interceptor import CallInterceptor
from server.rpc.listening import Listening, listen_for_probes
from server.rpc.openinference import OpenInferenceServicer
from server.rpc.pictures import Decoding
from server.rpc.tls import TLSError
from server.rpc.usage_service import UsageServicer
from server.scheduling import Admission, Quotas, Scheduler, Turns, batch_turns, engine_turns
from server.settings import Settings, is_loopback, joined
from server.telemetry.logs import finish_logging, get_logger, set_level
from server.telemetry.loop_delay import watch_loop
from server.telemetry.metrics import Metrics
from server.telemetry.routers import joined_memory
from server.telemetry.tracing import Tracer
from server.tenants import Directory, Tenants, TenantsError
from server.tenants.authentication import Authenticator

logger = get_logger("app")

# Seconds until background work that ended is started again.
_RESTART_S = 1.0
_SUPERVISOR = "supervisor"
# Seconds in which aborted requests get their status before the process ends.
_LAST_STATUSES_S = 0.5


def serve(settings: Settings, ready: Callable[[str], None]) -> int:
    """Run a server in this process; returns its exit status. `ready` gets the ready line once requests are served."""

    # Raise the limit of open files: each connection is one, and the usual soft limit is far below `max_connections`.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))

    async def run() -> int:
        try:
            app = App(settings)
        except StartError as error:
            _print_error(error)
            return 1
        return await app.run(ready)

    # uvloop takes less processor time per request than asyncio's own loop.
    return uvloop.run(run())


class App:
    """One server process: `run` it once.

    The constructor makes everything that answers calls; `_start` starts engines and loads adapters. This class receives
    events of the registry (`_set_catalog`), of the tenants' directory (`_on_tenants`), and of the engines (`_give_up`).
    """

    _engines: Engines

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._metrics = Metrics(exemplars=settings.metrics_exemplars)
        self._tracer = _tracer(settings, self._metrics)
        try:
            self._directory = Directory(
                settings.tenants,
                replicas=settings.replicas,
                open_admin=is_loopback(settings.host),
                on_change=self._on_tenants,
                on_failure=self._metrics.tenants_refused.inc,
            )
            self._audit = AuditLog(settings.audit_log, self._metrics)
            self._usage = Usage(settings.usage_dir, self._metrics)
        except (TenantsError, AuditError, UsageError) as error:
            raise StartError(str(error)) from None
        self._authenticator = Authenticator(
            self._directory, lambda issuer: self._metrics.jwks_failures.inc(labels=(issuer,))
        )
        turns = _turns(settings)
        most = [each.most for each in turns.values()]
        self._quotas = Quotas(self._metrics)
        max_queued = max(1, settings.in_flight_limit - turns[Lane.TEXT].most)
        self._scheduler = Scheduler(turns, max_queued, self._quotas, self._metrics)
        # Allow more than the queue's limit, so that the fair queue chooses which request to refuse. The same holds for
        # one tenant's part.
        max_in_flight, spare = settings.in_flight_limit + max(most), min(most) // 2
        self._admission = Admission(
            max_in_flight, self._scheduler, self._quotas, self._usage, self._metrics, spare=spare
        )
        self._on_tenants(self._directory.current)
        self._inference = InferenceServicer(
            self._admission,
            self._metrics,
            self._scheduler,
            self._directory,
            self._usage,
            Documents.from_settings(settings),
            Decoding.from_settings(settings),
            position_cost=settings.vision_position_cost,
            log_prompts=settings.log_prompts,
            generates=settings.language_backbone is not None,
        )
        self._adapters_service = AdaptersServicer(self._admission)
        self._open_inference = OpenInferenceServicer(self._inference, self._admission, self._adapters_service)
        self._health = Health(settings.slow_reader_s)
        # Close these at the end, even if the start fails.
        self._on_disk = contextlib.ExitStack()
        self._on_disk.callback(self._usage.close)

    async def run(self, ready: Callable[[str], None]) -> int:
        """Serve until a signal; returns the exit status."""
        self._handle_signals()
        self._set_health(serving=False)
        try:
            listening, address = await self._listen()
            try:
                await self._serve(listening, address, ready)
            finally:
                await listening.server.stop(grace=1.0)
                if self._tracer:
                    await asyncio.to_thread(self._tracer.close)
        except StartError as error:
            _print_error(error)
            self._exit(1)
        return 0

    async def _serve(self, listening: Listening, address: str, ready: Callable[[str], None]) -> None:
        began = time.monotonic()
        metrics_port, close_metrics = self._open_metrics()
        probed = await self._listen_for_probes()
        logger.info("listening", extra={"fields": {"address": address, "metrics_port": metrics_port}})
        self._warn_of_open_doors()
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            logger.info("stopped while starting")
            self._exit(0)
        starting.result()
        # Start to answer only now: clients assume that a server that answers is serving.
        await listening.server.start()
        seconds = round(time.monotonic() - began, 1)
        tasks = len(self._inference.catalog.tasks)
        logger.info("serving", extra={"fields": {"address": address, "tasks": tasks, "start_seconds": seconds}})
        metrics_address = joined(self._settings.metrics_host, metrics_port)
        ready(f"serving on {address}, metrics on {metrics_address}, {tasks} tasks")
        engines, lanes = self._engines, list(self._engines.supervisors)
        beside = [
            *(self._run_beside(_SUPERVISOR, partial(engines.supervise, lane)) for lane in lanes),
            self._run_beside("adapters", lambda: engines.adapters.registry.run(self._settings.adapters_poll_s)),
            self._run_beside("usage", self._usage.run),
            *(self._run_beside("engine metrics", partial(engines.poll, lane)) for lane in lanes),
            self._run_beside(
                "loop delay",
                lambda: watch_loop(self._metrics.loop_delay.observe, self._settings.loop_delay_interval_s),
            ),
        ]
        if self._settings.tenants is not None:
            beside += [
                self._run_beside("tenants", self._directory.watch),
                self._run_beside("token issuers", self._authenticator.tokens.run),
            ]
        await stopping
        self._metrics.serving.set(False)
        await listening.drain(self._health, self._admission)
        if self._engines.starting:
            # An engine's launch cannot be cancelled.
            self._exit(0)
        for task in beside:
            task.cancel()
        close_metrics()
        if probed:
            await probed.stop(None)
        self._shut_down()

    # Signals, and the three ports.

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGUSR1, set_level, "debug")
        loop.add_signal_handler(signal.SIGUSR2, set_level, self._settings.log_level)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("second signal, exiting at once")
            self._exit(128 + number)
        logger.info("stopping", extra={"fields": {"signal": signal.Signals(number).name}})
        self._stop.set()

    async def _listen(self) -> tuple[Listening, str]:
        anonymous = AnonymousCalls(self._settings)
        interceptor = CallInterceptor(
            self._settings,
            self._metrics,
            self._authenticator.tenant,
            self._quotas.count_request,
            anonymous,
            self._tracer,
            usage=self._usage,
            audit=self._audit,
        )
        try:
            listening = Listening(self._settings, [interceptor, AnonymousInterceptor(anonymous, self._settings)])
        except TLSError as error:
            raise StartError(str(error)) from None
        if certificates := listening.certificates:
            self._metrics.follow_certificate(str(certificates.path), certificates.not_after)
        listening.add(
            self._inference, self._adapters_service, UsageServicer(self._usage), self._open_inference, self._health
        )
        try:
            address = listening.bind()
        except OSError as error:
            await listening.server.stop(None)
            raise StartError(str(error)) from None
        return listening, address

    async def _listen_for_probes(self) -> Any | None:
        if (port := self._settings.health_port) is None:
            return None
        # Count probes separately, so that they pass even if strangers fill the main port.
        anonymous = AnonymousCalls(self._settings)
        interceptor = AnonymousInterceptor(anonymous, self._settings)
        server, bound = await listen_for_probes(self._settings, port, self._health, interceptor)
        if not bound:
            place = joined(self._settings.host, port)
            raise StartError(f"cannot listen on {place}: taken, or not an address of this machine (health_port)")
        return server

    def _warn_of_open_doors(self) -> None:
        settings, local = self._settings, is_loopback(self._settings.host)
        if settings.tenants is None:
            rights = "is an admin" if local else "may ask every task, and nobody is an admin"
            logger.warning(f"no tenants file: everybody who reaches {settings.host} {rights}")
        elif settings.tls_certificate is None and not local:
            logger.warning(f"no TLS on {settings.host}: keys and tokens travel unencrypted")

    def _open_metrics(self) -> tuple[int, Callable[[], None]]:
        host, port = self._settings.metrics_host, self._settings.metrics_port
        try:
            return self._metrics.serve(host, port)
        except OSError as error:
            raise StartError(f"cannot listen on {joined(host, port)}: {error} (metrics_host, metrics_port)") from None

    # The engine and its adapters.

    async def _start(self) -> None:
        """Start the engines and, meanwhile, verify the adapters; then load them and open the admission."""
        settings = self._settings
        wanted = {Lane.TEXT: settings.language_backbone, Lane.IMAGES: settings.vision_backbone}
        try:
            backbones = {
                lane: await asyncio.to_thread(resolve, backbone) for lane, backbone in wanted.items() if backbone
            }
            self._metrics.record_build(settings.language_backbone or "", settings.vision_backbone or "")
            await asyncio.to_thread(check_machine, settings, backbones)
            self._engines = engines = Engines(
                settings,
                backbones,
                self._metrics,
                self._inference,
                self._admission,
                self._scheduler,
                set_health=self._set_health,
                stopping=self._stop,
                give_up=self._give_up,
            )
            engines.adapters = adapters = await asyncio.to_thread(
                open_adapters,
                settings,
                backbones,
                engines.supervisors,
                # An engine runs by now, because types are compiled when an adapter is loaded.
                lambda constraints: self._inference.backend.engine.compile(constraints, of_tasks=True),
                self._metrics,
                self._set_catalog,
            )
            self._on_disk.callback(adapters.close)
            residencies = adapters.residencies
            self._metrics.follow_memory(lambda: joined_memory(each.memory() for each in residencies.values()))
            self._adapters_service.registry = adapters.registry
            self._adapters_service.uploads = adapters.uploads
            await engines.start()
        except (BackboneError, EngineStartError, SpoolError) as error:
            raise StartError(str(error)) from error
        except OSError as error:
            # The folder may be missing, full or read-only.
            raise StartError(f"the start failed: {error}") from error
        except EngineDeadError:
            raise StartError("the engine died while it loaded its adapters; the log above says why") from None

    # Background work.

    def _run_beside(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
        """Run `work` until cancelled. If it ends, log and count that, and start it again.

        Without its supervisor the server exits.
        """

        async def keep_running() -> None:
            while True:
                error: Exception | None = None
                try:
                    await work()
                except Exception as raised:
                    error = raised
                logger.error("background work ended", exc_info=error, extra={"fields": {"work": name}})
                self._metrics.background_ends.inc(labels=(name,))
                if name == _SUPERVISOR:
                    self._exit(1)
                await asyncio.sleep(_RESTART_S)

        return asyncio.create_task(keep_running(), name=name)

    def _set_catalog(self, catalog: Catalog) -> None:
        self._inference.catalog = catalog
        self._metrics.record_catalog(
            loaded=len(catalog.adapters), failed=len(catalog.failures), tasks=len(catalog.tasks)
        )

    def _on_tenants(self, tenants: Tenants) -> None:
        self._metrics.tenants.set(len(tenants.by_id))
        self._admission.keep_only(tenants.by_id.keys())

    def _set_health(self, *, serving: bool, live: bool = True) -> None:
        self._metrics.serving.set(serving)
        self._health.set(serving=serving, live=live)

    # The shutdown.

    def _shut_down(self) -> None:
        self._on_disk.close()
        self._engines.shutdown()

    async def _give_up(self, error: EngineGaveUpError) -> None:
        _print_error(error)
        self._set_health(serving=False, live=False)
        await asyncio.sleep(_LAST_STATUSES_S)
        self._exit(1)

    def _exit(self, status: int) -> None:
        """End at once."""
        self._on_disk.close()
        finish_logging()
        exit_at_once(status)


def _tracer(settings: Settings, metrics: Metrics) -> Tracer | None:
    if not settings.otlp_endpoint:
        return None
    label_of = metrics.task_label if settings.otlp_metrics else None
    return Tracer(settings.otlp_endpoint, sample_ratio=settings.trace_sample_ratio, label_of=label_of)


def _turns(settings: Settings) -> dict[Lane, Turns]:
    """Turns of each backbone's engines, whether the server starts them or not."""
    texts, images = (
        min(engine_turns(running), settings.in_flight_limit)
        for running in (settings.running_texts, settings.running_images)
    )
    batches = min(texts, batch_turns(settings.running_texts))
    return {Lane.TEXT: Turns(texts, batches), Lane.IMAGES: Turns(images, images)}


def _print_error(error: Exception) -> None:
    # Print after the log is written, because the message may refer to its lines.
    if finish_logging():
        # Errors of libraries may have several lines.
        print("mtlora-server:", " ".join(str(error).split()), file=sys.stderr, flush=True)
