"""Verification in a child process: what passes, what is refused, and its limits."""

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mtlora.checkpoint.format import ProjectorConfig
from mtlora.checkpoint.read import read_checkpoint
from mtlora.vision.families import VisionConfig
from mtlora.vision.image_input import ImageInput, ImagePreparation
from server.job import Lane
from server.registry.check import VerificationLimits
from server.registry.mirror import Mirror
from server.registry.source import Found, scan
from server.registry.spool import Spool, SpoolFullError
from server.registry.verifier import Verifier
from server.registry.version import ElsewhereError, StageError
from tests.faults._bad_files import KINDS
from tests.server.adapters import entry, write_adapter
from tests.server.slots import TINY
from tests.waiting import eventually


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that passes."""
    folder = tmp_path_factory.mktemp("verified") / "healthy"
    write_adapter(folder, [entry("x")], backbone=TINY)
    return folder


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifier]:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    yield Verifier(spool, {Lane.TEXT: TINY}, VerificationLimits(max_bytes=1 << 20, timeout_s=20))
    spool.close()


def found(root: Path) -> Found:
    (version,), _ = scan(root)
    return version


def test_a_copy_does_not_depend_on_the_folder_it_was_made_from(
    verifier: Verifier, healthy: Path, tmp_path: Path
) -> None:
    shutil.copytree(healthy, tmp_path / "a" / "1")
    verified = verifier.verify_now(tmp_path, found(tmp_path))
    again = verifier.verify_now(tmp_path, found(tmp_path))
    assert (again.content, again.folder) == (verified.content, verified.folder)
    shutil.rmtree(tmp_path / "a")
    assert read_checkpoint(verified.folder, TINY).manifest == verified.manifest
    assert [task.id for task in verified.manifest.tasks] == ["x"]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"vanishing"}))
@pytest.mark.parametrize("seed", [0, 1])
def test_bad_files_are_refused_with_a_reason(
    verifier: Verifier, healthy: Path, tmp_path: Path, kind: str, seed: int
) -> None:
    (tmp_path / "a").mkdir()
    KINDS[kind](healthy, tmp_path / "a" / "1", random.Random(f"{kind}-{seed}"))
    with pytest.raises(StageError) as raised:
        verifier.verify_now(tmp_path, found(tmp_path))
    assert raised.value.reason.startswith(f"{tmp_path / 'a' / '1'}")
    assert not list(verifier._spool.root.glob(".incoming-*"))


def test_refuses_a_version_that_vanished(verifier: Verifier, healthy: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "a" / "1")
    version = found(tmp_path)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(StageError, match="found nothing"):
        verifier.verify_now(tmp_path, version)


@pytest.mark.slow
def test_children_are_forked_from_a_process_without_vllm(tmp_path: Path) -> None:
    # A process of its own: multiprocessing has one fork server a process, and other tests start it too.
    script = f"""
import pickle, sys, types
sys.modules["vllm"] = types.ModuleType("vllm")
from pathlib import Path
from server.registry.spool import Spool, SpoolFullError
from server.isolation import Limits, in_child
from server.job import Lane
from server.registry.verifier import Verifier, VerificationLimits
from tests.server.slots import TINY
verifier = Verifier(Spool(Path({str(tmp_path)!r})), {{Lane.TEXT: TINY}}, VerificationLimits())
(modules,) = in_child(eval, "[sorted(__import__('sys').modules)]", limits=Limits(60))
print(*pickle.loads(modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert {"mtlora.checkpoint.read", "server.registry.check"} <= modules
    assert not {"vllm", "transformers", "grpc"} & modules


async def test_a_cancelled_verification_leaves_no_copy(healthy: Path, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    shutil.copytree(healthy, tmp_path / "adapters" / "a" / "1")
    verifier = Verifier(spool, {Lane.TEXT: TINY}, VerificationLimits())
    checking = asyncio.create_task(verifier.verify(tmp_path / "adapters", found(tmp_path / "adapters")))
    await eventually(lambda: any(spool.root.iterdir()))
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    await eventually(lambda: not any(spool.root.iterdir()))
    spool.close()


def test_time_is_limited(healthy: Path, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    shutil.copytree(healthy, tmp_path / "adapters" / "a" / "1")
    with pytest.raises(StageError, match=r"not done within 0\.001 s"):
        Verifier(spool, {Lane.TEXT: TINY}, VerificationLimits(timeout_s=0.001)).verify_now(
            tmp_path / "adapters", found(tmp_path / "adapters")
        )
    spool.close()


def test_memory_is_limited(healthy: Path, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    folder = tmp_path / "adapters" / "a" / "1"
    shutil.copytree(healthy, folder)
    # Provenance may hold any JSON: megabytes of text become many times that in objects.
    manifest = json.loads((folder / "adapter.json").read_text())
    manifest["training"] = {"list": [[]] * 1_500_000}
    (folder / "adapter.json").write_text(json.dumps(manifest, separators=(",", ":")))
    limits = VerificationLimits(max_bytes=8 << 20, timeout_s=60, headroom_bytes=16 << 20)
    with pytest.raises(StageError, match=r"takes more than 32 MiB of memory"):
        Verifier(spool, {Lane.TEXT: TINY}, limits).verify_now(tmp_path / "adapters", found(tmp_path / "adapters"))
    spool.close()


def test_limits_the_size_of_a_manifest(verifier: Verifier, healthy: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "a" / "1")
    with (tmp_path / "a" / "1" / "adapter.json").open("ab") as manifest:
        manifest.write(b" " * (16 << 20))
    with pytest.raises(StageError, match=r"adapter.json: found \d+ bytes; allowed: up to 16777216"):
        verifier.verify_now(tmp_path, found(tmp_path))


def test_a_copy_has_no_provenance(verifier: Verifier, healthy: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "a" / "1")
    plain = verifier.verify_now(tmp_path, found(tmp_path))
    manifest = json.loads((tmp_path / "a" / "1" / "adapter.json").read_text())
    (tmp_path / "a" / "1" / "adapter.json").write_text(json.dumps(manifest | {"training": {"long": [0] * 100_000}}))
    noted = verifier.verify_now(tmp_path, found(tmp_path))
    assert noted.content != plain.content
    assert noted.manifest == plain.manifest


def test_spools_of_dead_servers_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    living = Spool(tmp_path)
    abandoned = tmp_path / "mtlora-adapters-gone"
    (abandoned / "content").mkdir(parents=True)
    other = Spool(tmp_path)
    assert not abandoned.exists()
    assert living.root.exists()
    for spool in (living, other):
        spool.close()
    assert os.listdir(tmp_path) == []


def test_copies_stay_within_the_spools_limit(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    shutil.copytree(healthy, root / "a" / "1")
    version = found(root)
    spool = Spool(tmp_path / "spool", int(1.5 * version.size))
    verifier = Verifier(spool, {Lane.TEXT: TINY}, VerificationLimits())
    kept = verifier.verify_now(root, version)
    assert 0 < spool.bytes <= 1.5 * version.size
    used = spool.bytes
    with pytest.raises(StageError, match=rf"no space for a copy of \d+ bytes: copies of adapters take {used} bytes of"):
        verifier.verify_now(root, version)
    assert [path.name for path in spool.root.iterdir()] == [kept.content]
    assert spool.bytes == used
    spool.release(kept.content)
    assert spool.bytes == 0
    verifier.verify_now(root, version)
    spool.close()


def test_files_that_grow_do_not_pass_the_limit(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 100)
    incoming = spool.incoming(50)
    (incoming / "adapter.json").write_bytes(b"x" * 101)
    with pytest.raises(SpoolFullError):
        spool.keep(incoming, "content")
    spool.discard(incoming)
    assert (spool.bytes, list(spool.root.iterdir())) == (0, [])
    spool.close()


def test_a_mirror_counts_in_the_spool(healthy: Path, tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "storage" / "a" / "1")
    spool = Spool(tmp_path / "spool", found(tmp_path / "storage").size)
    mirror = Mirror(f"file://{tmp_path}/storage", spool.root / "mirror", 1 << 30, spool)
    mirror.sync()
    assert spool.bytes == found(tmp_path / "storage").size
    shutil.copytree(healthy, tmp_path / "storage" / "a" / "2")
    mirror.sync()
    assert [path.name for path in (spool.root / "mirror" / "a").iterdir()] == ["1"]
    shutil.rmtree(tmp_path / "storage" / "a")
    mirror.sync()
    assert spool.bytes == 0
    spool.close()


SIGHT = entry("sight", allowed_answers=("a", "b", "c"), image=ImageInput(size=28, pooling="cls"))
VISION = VisionConfig(
    family="dinov2", hidden_size=8, num_layers=2, num_heads=2, intermediate_size=16, patch_size=14, grid_size=4,
    activation="gelu", eps=1e-6,
)  # fmt: skip
BOTH = {Lane.TEXT: TINY, Lane.IMAGES: TINY.model_copy(update={"architecture": "TinySight"})}


def test_a_version_belongs_to_the_backbone_of_its_tasks(tmp_path: Path) -> None:
    """Whose heads are read with it."""
    spool = Spool(tmp_path / "spool")
    write_adapter(tmp_path / "root" / "a" / "1", [SIGHT], backbone=BOTH[Lane.IMAGES])
    limits = VerificationLimits(vision=VISION, image_size=28)
    verified = Verifier(spool, BOTH, limits).verify_now(tmp_path / "root", found(tmp_path / "root"))
    head = verified.heads["sight"]
    weight_CF, bias_C = read_checkpoint(verified.folder).head("sight")
    feature_F = np.arange(16, dtype=np.float32)
    assert np.allclose(head.logits(feature_F), weight_CF.numpy() @ feature_F[:8] + bias_C.numpy(), atol=1e-5)
    for backbones, other, reason in (
        ({Lane.TEXT: TINY}, limits, r"tasks of images: expected a server with a backbone for them \(vision_backbone\)"),
        (BOTH | {Lane.IMAGES: TINY}, limits, "backbone.architecture: expected 'Tiny'"),
        (BOTH, replace(limits, image_size=27), r"image.size: found 28, expected at most 27 \(vision_max_size\)"),
        (BOTH, replace(limits, vision=replace(VISION, patch_size=16)), "multiple of the backbone's patch, 16"),
        (BOTH, replace(limits, vision=replace(VISION, family="siglip_vision_model")), "found 'cls', expected mean"),
    ):
        with pytest.raises(StageError, match=reason) as refused:
            Verifier(spool, backbones, other).verify_now(tmp_path / "root", found(tmp_path / "root"))
        assert isinstance(refused.value, ElsewhereError) == (Lane.IMAGES not in backbones)
    spool.close()


def test_texts_with_images_need_both_backbones(tmp_path: Path) -> None:
    """The vision backbone is the projector's, and its patches divide the images."""
    spool, eyes = Spool(tmp_path / "spool"), BOTH[Lane.IMAGES]
    task = entry("ask", template="{image}{input}", picture=ImagePreparation(size=28))
    projector = ProjectorConfig(backbone=eyes, merge=2)
    write_adapter(tmp_path / "root" / "a" / "1", [task, entry("plain")], backbone=TINY, projector=projector)
    limits = VerificationLimits(vision=VISION, image_size=28)
    verified = Verifier(spool, BOTH, limits).verify_now(tmp_path / "root", found(tmp_path / "root"))
    assert verified.projector is not None
    weight_DK, bias_D = read_checkpoint(verified.folder).projector
    states_TD = np.arange(40, dtype=np.float32).reshape(5, 8)
    wanted_D = weight_DK.numpy() @ states_TD[1:].flatten() + bias_D.numpy()
    assert np.allclose(verified.projector.soft_tokens(states_TD, 1), [wanted_D], atol=1e-4)
    other = eyes.model_copy(update={"weights_fingerprint": "1" * 64})
    for backbones, changed, reason in (
        ({Lane.TEXT: TINY}, limits, r"expected a server with a vision backbone too \(vision_backbone\)"),
        ({Lane.IMAGES: eyes}, limits, r"tasks of texts: expected a server with a backbone for them"),
        (BOTH | {Lane.IMAGES: other}, limits, "projector.backbone.weights_fingerprint: expected '1111"),
        (BOTH, replace(limits, image_size=27), r"picture.size: found 28, expected at most 27 \(vision_max_size\)"),
        (
            BOTH,
            replace(limits, vision=replace(VISION, patch_size=28)),
            "multiple of 2 x 2 patches of 28",
        ),
    ):
        with pytest.raises(StageError, match=reason) as refused:
            Verifier(spool, backbones, changed).verify_now(tmp_path / "root", found(tmp_path / "root"))
        assert isinstance(refused.value, ElsewhereError) == (len(backbones) == 1)
    spool.close()


def test_texts_are_refused_without_a_language_backbone(healthy: Path, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    shutil.copytree(healthy, tmp_path / "root" / "a" / "1")
    with pytest.raises(StageError, match=r"tasks of texts: expected a server with a backbone for them \(backbone\)"):
        Verifier(spool, {Lane.IMAGES: TINY}, VerificationLimits()).verify_now(
            tmp_path / "root", found(tmp_path / "root")
        )
    spool.close()
