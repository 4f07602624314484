"""From an image to soft tokens: patches joined, projected, and put between tokens.

Shape suffixes: see mtlora/model/soft_tokens.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtlora.errors import BackboneError, MtLoRAError
from mtlora.model.language import Placed
from mtlora.model.soft_tokens import ImageReader, Projector
from mtlora.suite import load_suite
from mtlora.suite.base import Example
from mtlora.task import TaskSpec
from mtlora.vision.image_input import ImagePreparation, merged
from mtlora.vision.images import ImageError, decode, prepare
from tests.mtlora.vision.models import SIZE, write_model

D = 12
ASK = TaskSpec(id="ask", description="d", template="{image}{input}", picture=ImagePreparation(size=SIZE))
TEXT = TaskSpec(id="text", description="d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vision"), "dinov2 with registers")


@pytest.fixture
def reader(folder: Path) -> ImageReader:
    return ImageReader(folder, 2, D)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(1, 3))
def test_a_soft_token_is_a_square_of_neighbouring_patches(side: int, merge: int, prefix: int, hidden: int) -> None:
    """Each state names its row, column and dimension."""
    G = side * merge
    states_TD = np.full((prefix + G * G, hidden), -1.0)
    for row in range(G):
        for column in range(G):
            states_TD[prefix + row * G + column] = [1e4 * row + 100 * column + d for d in range(hidden)]
    found_SK = merged(states_TD, prefix, merge)
    assert found_SK.shape == (side * side, merge * merge * hidden)
    assert np.array_equal(found_SK, merged(torch.from_numpy(states_TD), prefix, merge).numpy())
    for s in range(side * side):
        wanted = [
            1e4 * (s // side * merge + y) + 100 * (s % side * merge + x) + d
            for y in range(merge)
            for x in range(merge)
            for d in range(hidden)
        ]
        assert found_SK[s].tolist() == wanted


def test_a_projector_starts_like_embeddings_and_folds_and_unfolds() -> None:
    """With two kinds of patches, each soft token is near the word that is said of images with its kind."""
    generator = torch.Generator().manual_seed(0)
    kinds_P = torch.arange(400) % 2
    states_PK = 5 + 3 * torch.randn(400, 64, generator=generator)
    states_PK[:, 0] += 20 * kinds_P
    embeddings_VD = 0.1 * torch.randn(300, D, generator=generator) + torch.arange(D)
    projector = Projector(64, D)
    words_PD = embeddings_VD[kinds_P]
    projector.fit(states_PK, words_PD, embeddings_VD)
    soft_PD = projector(states_PK).detach()
    assert (soft_PD.mean(0) - torch.arange(D)).abs().max() < 0.1
    assert float((soft_PD - soft_PD.mean(0)).std()) == pytest.approx(0.1, abs=0.01)
    closer = torch.cdist(soft_PD - soft_PD.mean(0), embeddings_VD[:2] - embeddings_VD[:2].mean(0)).argmin(1)
    assert (closer == kinds_P).float().mean() > 0.95
    weight_DK, bias_D = projector.folded()
    torch.testing.assert_close(states_PK @ weight_DK.T + bias_D, soft_PD, atol=1e-4, rtol=0)
    projector.unfold(weight_DK, bias_D)
    torch.testing.assert_close(projector(states_PK), soft_PD, atol=1e-4, rtol=0)


def test_a_projector_of_a_single_soft_token_starts_at_the_mean_embedding() -> None:
    embeddings_VD = torch.randn(50, D)
    projector = Projector(64, D)
    projector.fit(torch.randn(1, 64), torch.randn(1, D), embeddings_VD)
    torch.testing.assert_close(projector(torch.randn(3, 64)), embeddings_VD.mean(0).expand(3, D))


def test_an_image_is_looked_at_once_and_stands_at_its_place(reader: ImageReader, monkeypatch: Any) -> None:
    examples = load_suite("builtin-pictures").examples("picture_any", "train", 3)
    asked = [Example("ask", "", "", image=each.image) for each in (*examples, examples[0])]
    keys = reader.read([ASK, TEXT], [*asked, Example("text", "x", "y")])
    assert keys[4] is None
    assert keys[0] == keys[3]
    assert len(set(keys[:3])) == 3
    monkeypatch.setattr(reader, "_look", lambda new: pytest.fail("looked again") if new else None)
    assert reader.read([ASK], asked) == keys[:4]
    S = reader.num_soft_tokens(ASK.picture or ImagePreparation())
    assert S == 4
    with torch.no_grad():
        reader.projector.weight.normal_()
        embeds_BLD = torch.randn(2, 9, D)
        placed = [Placed(2, keys[1] or ""), Placed(9 + 5, keys[2] or "")]
        found_BLD = reader.embedded(embeds_BLD, placed)
        for row, at, key in ((0, 2, keys[1]), (1, 5, keys[2])):
            states_SK = reader.states([key or ""])
            torch.testing.assert_close(found_BLD[row, at : at + S], reader.projector(states_SK))
            kept = [i for i in range(9) if not at <= i < at + S]
            assert torch.equal(found_BLD[row, kept], embeds_BLD[row, kept])


def test_states_are_the_encoders(reader: ImageReader) -> None:
    example = load_suite("builtin-pictures").examples("picture_any", "train", 1)[0]
    (key,) = reader.read([ASK], [Example("ask", "", "", image=example.image)])
    assert ASK.picture
    pixels_CSS = prepare(decode(example.encoded_image()), ASK.picture, reader._mean, reader._std)
    with torch.inference_mode():
        (states_TD,) = reader._encoder(reader._encoder.embed(torch.from_numpy(pixels_CSS)[None]))
    torch.testing.assert_close(
        reader.states([key or ""]), merged(states_TD, reader.config.num_prefix, 2), atol=2e-3, rtol=2e-3
    )


def test_wrong_images_and_sizes_are_named(reader: ImageReader, folder: Path) -> None:
    with pytest.raises(ImageError, match="task ask: found bytes of an unknown format"):
        reader.read([ASK], [Example("ask", "", "", image=b"nothing")])
    with pytest.raises(MtLoRAError, match="an example without an image"):
        reader.read([ASK], [Example("ask", "x", "y")])
    with pytest.raises(BackboneError, match="expected a multiple of 2 x 2 patches of 14, 28"):
        reader.num_soft_tokens(ImagePreparation(size=42))
    with pytest.raises(BackboneError, match="expected a multiple of the backbone's patch, 14"):
        reader.num_soft_tokens(ImagePreparation(size=30))
