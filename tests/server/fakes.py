"""The service without an engine: the real servicer and interceptor around deltas that a test decides on."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import Access, AsyncClient
from mtlora.prompt import PromptEncoder
from mtlora.vision.images import ImageLimits
from server.accounting import AuditLog, Usage
from server.accounting.totals import Row
from server.job import Delta, GenerationJob, ServedTask
from server.registry.catalog import Catalog
from server.registry.residency import Residency
from server.rpc.adapters_service import AdaptersServicer
from server.rpc.anonymous import AnonymousCalls, AnonymousInterceptor
from server.rpc.documents import Documents
from server.rpc.health import Health
from server.rpc.inference_service import InferenceServicer, TextBackend
from server.rpc.interceptor import CallInterceptor
from server.rpc.listening import Listening
from server.rpc.openinference import OpenInferenceServicer
from server.rpc.pictures import Decoding
from server.rpc.usage_service import UsageServicer
from server.rpc.validation import PromptLimits
from server.scheduling import State
from server.settings import is_loopback, load_settings
from server.telemetry.metrics import Metrics
from server.telemetry.tracing import Tracer
from server.tenants import Directory
from server.tenants.authentication import Authenticator
from tests.server.adapters import entry
from tests.server.front import Front


class FakeTokenizer:
    """One token for each character."""

    chat_template = "yes"
    all_special_tokens = ("<|end|>",)
    eos_token_id = 0
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["content"] for message in messages)

    def get_vocab(self) -> dict[str, int]:
        return {chr(code): code for code in range(300)}

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


class FakeEngine:
    """Yields `deltas`, then raises `error` if there is one, else waits for `hold` before the last."""

    def __init__(self) -> None:
        self.deltas = [Delta(" a", 1), Delta("b ", 1, finish_reason="stop")]
        self.error: Exception | None = None
        self.hold: asyncio.Event | None = None
        self.running = 0
        self.jobs: list[GenerationJob] = []

    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        self.jobs.append(job)
        self.running += 1
        try:
            yield self.deltas[0]
            # Yield like a real engine's step, so that the first delta can be read before the second exists.
            await asyncio.sleep(0.01)
            if self.error:
                raise self.error
            if self.hold:
                await self.hold.wait()
            for delta in self.deltas[1:]:
                yield delta
                await asyncio.sleep(0.01)
        finally:
            self.running -= 1


class FakeMemory:
    """An engine's memory that takes every adapter at once."""

    async def load(self, folder: Path, slots: Sequence[Any]) -> None:
        pass

    async def unload(self, slots: Sequence[Any]) -> None:
        pass


class FakeRegistry:
    """Records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    async def load(self, name: str) -> None:
        self.asked.append(("load", name))

    async def unload(self, name: str) -> None:
        self.asked.append(("unload", name))


async def usage_rows(usage: Usage, granularity: str = "total", span: tuple[int, int] = (0, 2**40)) -> list[Row]:
    """(period's begin, tenant, task, counts) of everything recorded."""
    return [row async for page in usage.read(*span, granularity) for row in page]


class Service:
    """A gRPC server in this process, serving two tasks.

    keys, entries: API key and entry in the tenants file of each tenant by id, where `with_tenants` made it.
    """

    def __init__(
        self,
        max_in_flight: int = 4,
        *,
        log_prompts: bool = False,
        turns: int | None = None,
        most_batch: int | None = None,
        **settings: Any,
    ) -> None:
        self.keys: dict[str, str] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self.settings = load_settings({"allow_no_tasks": True, "port": 0, "metrics_port": 0, **settings})
        self.directory = Directory(
            self.settings.tenants, replicas=self.settings.replicas, open_admin=is_loopback(self.settings.host)
        )
        self.metrics = Metrics()
        self.usage = Usage(self.settings.usage_dir, self.metrics)
        turns = turns or max_in_flight
        self.front = Front(
            turns,
            max_in_flight,
            image_turns=turns,
            most_batch=most_batch,
            max_in_flight=max_in_flight,
            usage=self.usage,
            metrics=self.metrics,
        )
        self.scheduler, self.admission = self.front.scheduler, self.front.admission
        self.audit = AuditLog(self.settings.audit_log, self.metrics)
        self.engine = cast(Any, FakeEngine())
        self.registry = cast(Any, FakeRegistry())
        self.servicer = InferenceServicer(
            self.admission,
            self.metrics,
            self.scheduler,
            self.directory,
            self.usage,
            Documents(self.settings.document_lifetime_s, self.settings.max_documents, self.settings.max_document_mib),
            Decoding(ImageLimits(self.settings.message_limit, self.settings.max_image_pixels), threads=2),
            log_prompts=log_prompts,
        )
        # A test that needs a real registry sets it.
        self.adapters = AdaptersServicer(self.admission)
        self.adapters.registry = self.registry
        self.open_inference = OpenInferenceServicer(self.servicer, self.admission, self.adapters)
        self.engine.prompts = PromptEncoder(FakeTokenizer())
        self.servicer.backend = TextBackend(
            self.engine, Residency(FakeMemory(), capacity=2), PromptLimits(max_model_len=64, vocab_size=300)
        )
        self.servicer.catalog = Catalog(
            MappingProxyType({name: ServedTask(entry(name), "alpha", "1", slot=None) for name in ("one", "two")})
        )
        self.address = ""

    @classmethod
    def with_tenants(
        cls,
        folder: Path,
        tenants: Mapping[str, dict[str, Any]],
        *arguments: Any,
        objectives: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> "Service":
        """A server with these tenants, by id, and the fields of their entries; `folder` gets their file."""
        keys, entries = {}, {}
        for name, fields in tenants.items():
            keys[name], entries[name] = tenant(name, **fields)
        more = {"objectives": dict(objectives)} if objectives else {}
        path = write_tenants(folder / "tenants.yaml", *entries.values(), **more)
        service = cls(*arguments, tenants=path, **settings)
        service.keys, service.entries = keys, entries
        return service

    def access(self, tenant_id: str) -> Access:
        """The access of a tenant with its key."""
        return Access(api_key=self.keys[tenant_id])

    def client(self, tenant_id: str) -> AsyncClient:
        """A tenant's client, which repeats no call."""
        return AsyncClient(self.address, self.access(tenant_id), retry=None)

    def serve(self, *tasks: ServedTask) -> None:
        """Serve these tasks too, or in place of those of the same ids."""
        catalog = self.servicer.catalog
        served = {**catalog.tasks, **{task.spec.id: task for task in tasks}}
        self.servicer.catalog = replace(catalog, tasks=MappingProxyType(served))

    def use(self, engine: Any, **changes: Any) -> None:
        """Let another engine answer texts."""
        engine.prompts = self.engine.prompts
        self.engine = engine
        self.servicer.backend = replace(self.servicer.backend, engine=engine, **changes)

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if it has none yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def used(self) -> list[Row]:
        """(0, tenant, task, counts) of all usage so far."""
        return await usage_rows(self.usage)

    async def drain(self) -> None:
        """Drain the server as SIGTERM does."""
        await self.listening.drain(self.health, self.admission)

    @asynccontextmanager
    async def running(self, tracer: Tracer | None = None) -> AsyncIterator["Service"]:
        authenticate = Authenticator(self.directory).tenant
        self.anonymous = anonymous = AnonymousCalls(self.settings)
        interceptor = CallInterceptor(
            self.settings,
            self.metrics,
            authenticate,
            self.front.quotas.count_request,
            anonymous,
            tracer,
            usage=self.usage,
            audit=self.audit,
        )
        self.listening = listening = Listening(
            self.settings, [interceptor, AnonymousInterceptor(anonymous, self.settings)]
        )
        self.health = health = Health(self.settings.slow_reader_s)
        health.set(serving=True)
        listening.add(self.servicer, self.adapters, UsageServicer(self.usage), self.open_inference, health)
        self.address = listening.bind()
        self.admission.state = State.SERVING
        await listening.server.start()
        try:
            yield self
        finally:
            await listening.server.stop(0)
