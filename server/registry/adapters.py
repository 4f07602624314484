"""Builds a server's registry from its settings."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.errors import AdapterError
from server.job import Lane
from server.registry.catalog import Catalog
from server.registry.check import VerificationLimits
from server.registry.events import Events
from server.registry.folder import Folder
from server.registry.lifecycle import Lifecycle
from server.registry.mirror import Mirror
from server.registry.registry import Registry
from server.registry.residency import LoadsSlots, Prepare, Residency
from server.registry.source import Found
from server.registry.spool import Spool
from server.registry.storage import Storage
from server.registry.uploads import Uploads
from server.registry.verifier import Verifier
from server.registry.version import AdapterVersion
from server.settings import Settings, is_url
from server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from mtlora.backbone import BackboneArchitecture
    from mtlora.task import TaskSpec


class AdapterEngine(LoadsSlots, Protocol):
    """The engine methods that the registry uses, for both kinds of engine."""

    async def warm_up(self, slot: Any | None, *, short: bool = False) -> None: ...


# Most types that one engine call compiles.
_COMPILED_AT_ONCE = 16

# `Engine.compile` of the running engine of texts, for tasks' constraints.
Compile = Callable[[Sequence[str]], Awaitable[list[int]]]


@dataclass
class Adapters:
    """The registry and its parts; `close` removes the registry's files."""

    registry: Registry
    residencies: Mapping[Lane, Residency]
    spool: Spool
    verifier: Verifier
    uploads: Uploads

    def close(self) -> None:
        self.verifier.close()
        self.spool.close()


def open_adapters(
    settings: Settings,
    backbones: Mapping[Lane, Path],
    engines: Mapping[Lane, AdapterEngine],
    compile: Compile,
    metrics: Metrics,
    publish: Callable[[Catalog], None],
) -> Adapters:
    """Make a registry over `settings.adapters`, or over an empty folder if that is unset. Does not read adapters yet.

    A server has an engine for one lane or for both. Raises BackboneError.
    """
    from mtlora.vllm_plugin.requests import slot_requests

    prepare: dict[Lane, Prepare] = {Lane.TEXT: lambda version: _compile_types(compile, version)}
    residencies = {lane: _residency(engine, prepare.get(lane), settings, metrics) for lane, engine in engines.items()}
    spool = Spool.from_settings(settings)
    metrics.adapter_cache_bytes.set_function(lambda: spool.bytes)
    metrics.adapters_resident.set_function(lambda: sum(len(each.resident) for each in residencies.values()))
    verifier = _verifier(spool, settings, backbones)
    root, mirror = _root(settings, spool)
    events = Events(
        lambda event: metrics.record_stage(event.stage.value, event.failed_stage.value if event.failed_stage else None)
    )
    vision = backbones.get(Lane.IMAGES)
    lifecycle = Lifecycle(
        root=root,
        verifier=verifier,
        spool=spool,
        residencies=residencies,
        make_slots=slot_requests,
        warm=lambda version: engines[version.lane].warm_up(version.distinct_slots[0], short=True),
        events=events,
        prepare_images=_normalising(vision) if vision else lambda spec: spec,
    )
    storage = Storage(settings.storage_timeout_s, metrics.storage_timeouts.inc)
    registry = Registry(Folder(root, events, mirror, storage), lifecycle, publish, on_swap=metrics.adapter_swap.observe)

    async def verify(root: Path, found: Found) -> None:
        spool.release((await verifier.verify(root, found)).content)

    own = None if mirror or settings.adapters is None else root
    uploads = Uploads.from_settings(settings, own, verify, storage)
    return Adapters(registry, residencies, spool, verifier, uploads)


def _residency(engine: AdapterEngine, prepare: Prepare | None, settings: Settings, metrics: Metrics) -> Residency:
    return Residency(
        engine,
        settings.adapter_slots,
        on_cold=metrics.adapter_cold.observe,
        on_load=metrics.adapter_load.observe,
        on_evict=metrics.adapter_evictions.inc,
        prepare=prepare,
    )


def _verifier(spool: Spool, settings: Settings, backbones: Mapping[Lane, Path]) -> Verifier:
    from mtlora.backbone import vocabulary
    from mtlora.vision.families import read_config

    language, vision = backbones.get(Lane.TEXT), backbones.get(Lane.IMAGES)
    limits = VerificationLimits(
        settings.max_adapter_mib << 20,
        settings.verify_timeout_s,
        tokens=vocabulary(language) if language else None,
        vision=read_config(vision) if vision else None,
        image_size=settings.vision_max_size,
    )
    return Verifier(spool, {lane: _identity(backbone, settings) for lane, backbone in backbones.items()}, limits)


def _identity(backbone: Path, settings: Settings) -> "BackboneArchitecture":
    """The backbone that adapters must have been trained beside."""
    from mtlora.backbone import identify

    made_beside = identify(backbone)
    return made_beside if settings.adapter_backbone_check == "strict" else made_beside.without_weights()


def _normalising(vision: Path) -> Callable[["TaskSpec"], "TaskSpec"]:
    """A function that sets the backbone's mean and standard deviation in a task that takes an image and has none."""
    from mtlora.vision.families import read_normalisation

    mean, std = read_normalisation(vision)

    def normalising(spec: "TaskSpec") -> "TaskSpec":
        name = "image" if spec.image else "picture"
        image = spec.image or spec.picture
        if image is None:
            return spec
        own = {"mean": image.mean or mean, "std": image.std or std}
        return spec.model_copy(update={name: image.model_copy(update=own)})

    return normalising


async def _compile_types(compile: Compile, version: AdapterVersion) -> None:
    """Raises AdapterError for a type that the engine refuses, or whose shortest answer exceeds a task's limit."""
    texts = {task: found.text for task, spec in version.specs.items() if (found := spec.constraint())}
    distinct = list(dict.fromkeys(texts.values()))
    fewest: dict[str, int] = {}
    # Compile a few at a time, so that other adapters' types need not wait for all of them.
    for start in range(0, len(distinct), _COMPILED_AT_ONCE):
        some = distinct[start : start + _COMPILED_AT_ONCE]
        fewest |= zip(some, await compile(some), strict=True)
    for task, text in texts.items():
        if fewest[text] > (most := version.specs[task].max_new_tokens):
            raise AdapterError(f"task {task}: max_new_tokens: found {most}; its shortest answer takes {fewest[text]}")
    version.fewest = {task: fewest[text] for task, text in texts.items()}


def _root(settings: Settings, spool: Spool) -> tuple[Path, Mirror | None]:
    """The folder of adapters, and what fills it where they come from a URL."""
    adapters = settings.adapters
    if adapters is not None and not is_url(adapters):
        return Path(adapters), None
    local = spool.root / "mirror"
    local.mkdir()
    return local, Mirror(adapters, local, settings.max_adapter_mib << 20, spool) if adapters is not None else None
