"""Images through gRPC to a real engine with a vision backbone, beside the engine of the language backbone."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.harness.processes import process_tree
from benchmarks.harness.waiting import wait_until
from mtlora.adapter import AdapterSet
from mtlora.answer import Label
from mtlora.backbone import identify
from mtlora.checkpoint.format import ProjectorConfig
from mtlora.checkpoint.read import read_checkpoint
from mtlora.cli import main as run_mtlora
from mtlora.client import AsyncClient, Client, ServerError
from mtlora.client.messages import make_request
from mtlora.model.language import Placed, load_adapted_model
from mtlora.suite.base import Example
from mtlora.vision.encoder import load_encoder, pool
from mtlora.vision.families import read_normalisation
from mtlora.vision.image_input import ImagePreparation
from mtlora.vision.images import decode, prepare
from server.cli.process import ServerProcess
from tests.mtlora.vision.pictures import bomb, encoded, photograph
from tests.server.adapters import entry, write_adapter
from tests.server.live.conftest import SIGHTS

IMAGES = {
    "small": encoded(photograph(60, 40), "JPEG", quality=95),
    "large": encoded(photograph(400, 300), "JPEG", quality=90),
    "alpha": encoded(photograph(30, 80).convert("RGBA")),
}


@torch.no_grad()
def probabilities(backbone: Path, adapter: Path, task_id: str, image: bytes) -> dict[str, float]:
    """By the plain encoder with the adapter attached by hooks, and the checkpoint's head."""
    encoder, identity, checkpoint = load_encoder(backbone), identify(backbone), read_checkpoint(adapter)
    task = checkpoint.manifest.task(task_id)
    assert task.image is not None
    paths = AdapterSet(
        checkpoint.manifest.config, identity.hidden_size, identity.num_layers, len(checkpoint.manifest.tasks)
    )
    paths.load_state_dict({name: tensor.float() for name, tensor in checkpoint.paths.items()})
    paths.eval().attach(encoder)
    paths.context.bias_index = torch.tensor([task.bias_index])
    pixels_CSS: NDArray[np.float32] = prepare(
        decode(image, size=task.image.size), task.image, *read_normalisation(backbone)
    )
    states_BTD = encoder(encoder.embed(torch.from_numpy(pixels_CSS)[None]))
    feature_F = pool(states_BTD, task.image.pooling, encoder.config.num_prefix)[0]
    weight_CF, bias_C = (tensor.float() for tensor in checkpoint.head(task_id))
    found_C = (weight_CF @ feature_F + bias_C).softmax(-1).tolist()
    return dict(zip(task.labels or (), found_C, strict=True))


async def test_mixed_images_are_answered_as_by_the_plain_encoder_beside_texts(
    server: ServerProcess, adapters: Path, vision_backbone: Path
) -> None:
    """All in flight at once, so that the engine's batches mix tasks and sizes."""
    async with AsyncClient(server.address) as client:
        texts = [asyncio.create_task(client.generate("echo", f"text {i}")) for i in range(8)]
        calls = {
            name: asyncio.create_task(client.classify([task.id for task in SIGHTS], [image] * 2))
            for name, image in IMAGES.items()
        }
        for name, call in calls.items():
            for found in await call:
                expected = probabilities(vision_backbone, adapters / "eyes" / "1", found.task_id, IMAGES[name])
                assert dict(found.probabilities) == pytest.approx(expected, abs=2e-4), (name, found.task_id)
                assert found.summary is not None
                assert (found.summary.adapter_name, found.summary.adapter_version) == ("eyes", "1")
        assert all(answer.summary.completion_tokens for answer in await asyncio.gather(*texts))


ASK = entry("ask_about", template="{image}\\n{input}\\nAnswer:", picture=ImagePreparation(size=56), max_new_tokens=4)


def test_a_text_with_an_image_is_answered_as_by_hugging_face(
    server: ServerProcess, client: Client, adapters: Path, backbone: Path, vision_backbone: Path, tmp_path: Path
) -> None:
    """Decoded, encoded, projected and read by two engines; the language backbone's is in bfloat16."""
    folder = adapters / "readers" / "1"
    projector = ProjectorConfig(backbone=identify(vision_backbone), merge=2)
    either = entry(
        "ask_either", template="{image}Which?", picture=ImagePreparation(size=28), answer=Label(labels=("a", "b"))
    )
    write_adapter(folder.with_name(".1"), [ASK, either], backbone=identify(backbone), projector=projector)
    folder.with_name(".1").rename(folder)
    wait_until(lambda: ASK.id in {task.id for task in client.tasks()}, 60)
    adapted = load_adapted_model(backbone, read_checkpoint(folder), torch.float32, vision_backbone)
    assert adapted.reader is not None
    found: dict[str, Any] = {}
    for name, image in IMAGES.items():
        answer = found[name] = client.generate(ASK.id, "What is it?", image=image, logprobs=5)
        (key,) = adapted.reader.read([ASK], [Example(ASK.id, "What is it?", "", image=image)])
        ids, at = adapted.prompts.around_image(ASK.around_image("What is it?"), 4)
        assert answer.summary.prompt_tokens == len(ids)
        with torch.inference_mode(), adapted.adapters.context.use(torch.tensor([0])):
            logits_LV = adapted.model(**adapted.inputs(torch.tensor([ids]), [Placed(at, str(key))])).logits[0]
        logprobs_V = logits_LV[-1].log_softmax(-1)
        for each in answer.logprobs[0].top:
            assert each.logprob == pytest.approx(float(logprobs_V[each.token_id]), abs=0.25), (name, each)
    assert len({answer.logprobs[0].chosen.logprob for answer in found.values()}) == len(IMAGES)
    # Beside others, in pieces, and from the prefix cache: the same.
    pieces = list(client.stream(ASK.id, "What is it?", image=IMAGES["small"]))
    assert "".join(piece.text for piece in pieces).strip() == found["small"].text
    batch = client.generate_all([make_request(ASK.id, "What is it?", image=image) for image in IMAGES.values()])
    assert [each.result().text for each in batch] == [answer.text for answer in found.values()]
    typed = client.generate(either.id, image=IMAGES["small"])
    assert typed.text in ("a", "b")
    assert typed.answer_type == "label"
    # A folder's suite, through the server.
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "a.jpg").write_bytes(IMAGES["small"])
    example = {"input": "What is it?", "image": "a.jpg", "target": found["small"].text or "nothing"}
    (suite / f"{ASK.id}.json").write_text(json.dumps({"picture": {"size": 56}, "examples": [example]}))
    through = [
        "--through",
        server.address,
        "--adapter",
        str(folder),
        "--suite",
        str(suite),
        "--backbone",
        str(backbone),
    ]
    assert run_mtlora(["eval", *through, "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["answers"][0]["adapter"] == found["small"].text
    client.generate(ASK.id, "What is it?", without_adapter=True)
    with pytest.raises(ServerError, match="found none; allowed: an image"):
        client.generate(ASK.id, "What is it?")


def test_hostile_images_end_in_statuses(client: Client) -> None:
    bad, good = client.classify(SIGHTS[0].id, [bomb(), IMAGES["small"]])
    assert good.label
    assert bad.error is not None
    assert bad.error.code is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(ServerError, match="a task of images"):
        client.generate(SIGHTS[0].id, "What is it?")
    with pytest.raises(ServerError, match="a task of texts"):
        client.classify("echo", [IMAGES["small"]])


def test_versions_of_images_come_and_split(client: Client, adapters: Path, vision_backbone: Path) -> None:
    task_id = SIGHTS[0].id
    write_adapter(adapters / "eyes" / ".2", SIGHTS, backbone=identify(vision_backbone), seed=2)
    (adapters / "eyes" / ".2").rename(adapters / "eyes" / "2")

    def versions(count: int) -> Counter[str]:
        images = [encoded(photograph(20 + i, 20)) for i in range(count)]
        found = client.classify(task_id, images)
        assert not any(each.error for each in found)
        return Counter(each.summary.adapter_version for each in found if each.summary)

    wait_until(lambda: versions(1) == {"2": 1}, 60)
    expected = probabilities(vision_backbone, adapters / "eyes" / "2", task_id, IMAGES["small"])
    (found,) = client.classify(task_id, [IMAGES["small"]])
    assert dict(found.probabilities) == pytest.approx(expected, abs=2e-4)
    client.set_adapter_weights({"1": 1, "2": 1}, adapter="eyes")
    assert set(versions(40)) == {"1", "2"}
    client.set_adapter_weights({}, adapter="eyes")
    assert client.rollback_adapter("eyes").version == "1"
    assert versions(4) == {"1": 4}


def test_an_engine_that_dies_leaves_the_other_alone(server: ServerProcess, client: Client) -> None:
    """Either engine may die. The server starts it again meanwhile."""

    def texts() -> None:
        client.generate("echo", "x", timeout=30)

    def images() -> None:
        (found,) = client.classify(SIGHTS[0].id, [IMAGES["small"]], timeout=30)
        if found.error:
            raise found.error

    def works(ask: Any) -> bool:
        try:
            ask()
        except ServerError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    engines = [each for each in process_tree(server.process.pid) if each.name().startswith("VLLM::")]
    assert len(engines) == 2
    engines[0].kill()
    psutil.wait_procs(engines[:1])
    wait_until(lambda: works(texts) + works(images) == 1, 60)
    healthy = texts if works(texts) else images
    for _ in range(10):
        assert works(healthy)
    assert client.is_serving()
    wait_until(lambda: works(texts) and works(images), 120)
