"""The default vision backbone as a whole: the folder that transformers loads, and the encoder that is made of it."""

from pathlib import Path

import pytest
import torch

from mtlora.backbone import identify, resolve
from mtlora.vision.encoder import load_encoder
from mtlora.vision.families import IMAGENET, read_normalisation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("vision")


def test_transformers_takes_the_folder_and_computes_the_same(folder: Path) -> None:
    from transformers import Dinov2Model

    model, loading = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_056_576
    encoder = load_encoder(folder)
    generator = torch.Generator().manual_seed(0)
    for size in (112, 518):
        pixels_BCSS = torch.randn(1, 3, size, size, generator=generator)
        with torch.inference_mode():
            expected_BTD = model.eval()(pixel_values=pixels_BCSS).last_hidden_state
            found_BTD = encoder(encoder.embed(pixels_BCSS))
        assert expected_BTD.abs().max() > 1
        torch.testing.assert_close(found_BTD, expected_BTD, atol=1e-4, rtol=0)


def test_the_default_backbone_keeps_its_fingerprint_and_normalisation(folder: Path) -> None:
    identity = identify(folder)
    assert (identity.architecture, identity.hidden_size, identity.num_layers) == ("Dinov2Model", 384, 12)
    # Adapters store this fingerprint, so another reader of the file must give the same weights and names.
    assert identity.weights_fingerprint == "5984cc501f7d3335367141f046a24052aec6f859d4092709f6c9b78c8af959d4"
    assert read_normalisation(folder) == IMAGENET
