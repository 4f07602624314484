"""The engines of a server, one per lane, and what happens when one starts, is lost or fails for good."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from server.engine import (
    BaseEngine,
    Engine,
    EngineFailure,
    EngineGaveUpError,
    EngineStats,
    Supervisor,
    VisionEngine,
)
from server.job import Lane
from server.registry.adapters import Adapters
from server.rpc.classify import ImageBackend
from server.rpc.inference_service import InferenceServicer, TextBackend
from server.rpc.validation import PromptLimits
from server.scheduling import Admission, Scheduler, State
from server.settings import Settings
from server.telemetry.logs import get_logger
from server.telemetry.metrics import Metrics

logger = get_logger("app")

# Seconds between polls. Routers and alerts read these values, so the interval must be below their shortest window.
_POLL_INTERVAL_S = 2.0


class StartError(Exception):
    """The server cannot start; the message says why."""


class SetHealth(Protocol):
    """Sets what clients and probes are told: whether the server serves, and whether it is alive."""

    def __call__(self, *, serving: bool, live: bool = True) -> None: ...


class Engines:
    """Set `adapters`, then call `start`, then run `supervise` and `poll` for each lane beside the requests.

    If one engine is lost, the other continues to serve. stopping: set when the server drains; no engine starts to serve
    after that. give_up: called when the last engine that served has failed too often.
    """

    adapters: Adapters
    _verifying: asyncio.Future[None]

    def __init__(
        self,
        settings: Settings,
        backbones: Mapping[Lane, Path],
        metrics: Metrics,
        inference: InferenceServicer,
        admission: Admission,
        scheduler: Scheduler,
        *,
        set_health: SetHealth,
        stopping: asyncio.Event,
        give_up: Callable[[EngineGaveUpError], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._inference = inference
        self._admission = admission
        self._scheduler = scheduler
        self._set_health = set_health
        self._stopping = stopping
        self._give_up = give_up
        self.supervisors = {lane: self._supervisor(lane, backbone) for lane, backbone in backbones.items()}
        # Lanes whose engine is serving.
        self._serving: set[Lane] = set()

    async def start(self) -> None:
        """Start the engines and meanwhile verify the adapters; then load the adapters and open the admission.

        Raises StartError, EngineStartError, or EngineDeadError.
        """
        self._verifying = asyncio.ensure_future(self._verify_adapters())
        # Do both together: if nothing can be served, the start fails without waiting for the engine.
        await asyncio.gather(*(each.start() for each in self.supervisors.values()), self._verifying)

    async def supervise(self, lane: Lane) -> None:
        """Replace a lane's engine whenever it fails."""
        while True:
            try:
                await self.supervisors[lane].run()
            except EngineGaveUpError as error:
                logger.error("the engine failed too often; giving up", extra={"fields": {"reason": str(error)}})
                if not self._serving:
                    await self._give_up(error)
                # The other engine continues to serve.
                await asyncio.sleep(self._settings.engine_failure_window_s)

    async def poll(self, lane: Lane) -> None:
        """Keep the metrics of an engine's processes up to date; one that hangs holds up no other's."""
        supervisor = self.supervisors[lane]
        while True:
            engine = supervisor.engine
            if engine is not None and engine.alive and not supervisor.starting:
                try:
                    self._metrics.record_workers(await engine.worker_stats(), lane)
                except Exception as error:
                    # Ignore it here: the supervisor replaces a dead engine.
                    logger.warning("no statistics from the engine", extra={"fields": {"reason": str(error)}})
            await asyncio.sleep(_POLL_INTERVAL_S)

    @property
    def starting(self) -> bool:
        """Whether an engine is starting, which cannot be stopped."""
        return any(each.starting for each in self.supervisors.values())

    def shutdown(self) -> None:
        """Stop their processes. Blocks for a few seconds at most."""
        for each in self.supervisors.values():
            if each.engine is not None:
                each.engine.shutdown()

    def _supervisor(self, lane: Lane, backbone: Path) -> Supervisor:
        kind: type[BaseEngine] = Engine if lane is Lane.TEXT else VisionEngine
        settings = self._settings

        def on_stats(stats: EngineStats) -> None:
            self._metrics.record_engine(stats, lane)
            self._scheduler.stepped(lane)

        return Supervisor(
            lambda: kind(settings, backbone, on_stats),
            partial(self._started, lane),
            partial(self._lost, lane),
            hang_s=settings.engine_hang_s,
            max_failures=settings.engine_max_failures,
            window_s=settings.engine_failure_window_s,
        )

    async def _verify_adapters(self) -> None:
        await self.adapters.registry.verify_all()
        self._check_catalog()

    def _check_catalog(self) -> None:
        if not self._inference.catalog.tasks and not self._settings.allow_no_tasks:
            raise StartError(f"{self._settings.adapters}: no adapter there can be served; the log above says why")

    async def _started(self, lane: Lane, engine: BaseEngine) -> None:
        """Load the serving versions into a new engine; start to serve once every engine has started."""
        await self._verifying
        residency = self.adapters.residencies[lane]
        if isinstance(engine, Engine):
            limits = PromptLimits(self._settings.max_model_len, engine.vocab_size, engine.end_tokens)
            self._inference.backend = TextBackend(engine, residency, limits)
            self._metrics.record_kv_cache(engine.kv_cache)
        elif isinstance(engine, VisionEngine):
            self._inference.classifier.backend = ImageBackend(engine, residency)
        await self.adapters.registry.load_all(lane)
        if self._admission.state is State.STARTING:
            self._check_catalog()
        resident = residency.resident
        await self.supervisors[lane].warm_up(resident[-1].distinct_slots[0] if resident else None)
        self._serving.add(lane)
        starting = self._admission.state is State.STARTING and self._serving < self.supervisors.keys()
        if not self._stopping.is_set() and not starting:
            _freeze_objects()
            self._admission.lost.discard(lane)
            self._admission.state = State.SERVING
            self._set_health(serving=True)

    async def _lost(self, lane: Lane, failure: EngineFailure) -> None:
        """Stop serving an engine's tasks until another engine runs."""
        self._serving.discard(lane)
        self._admission.lost.add(lane)
        if not self._serving:
            if not self._stopping.is_set():
                self._admission.state = State.RESTARTING
            self._set_health(serving=False)
        self._metrics.record_engine_restart(failure.kind, lane)
        self.adapters.residencies[lane].reset()


def _freeze_objects() -> None:
    """Exclude all living objects from garbage collections, which would delay streams."""
    gc.collect()
    gc.freeze()
    # Collect once more: the threshold of the next full collection follows from the number of objects left here.
    gc.collect()
