"""The plain encoder equals transformers' model of every family, at every size."""

from pathlib import Path

import pytest
import torch

from mtlora.vision.encoder import load_encoder
from tests.mtlora.vision.models import MODELS, PATCH, SIZE, new_model


@torch.inference_mode()
def reference(model, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """States after the final norm."""
    family = model.config.model_type
    if family == "siglip2_vision_model":
        B, _, H, W = pixels_BCHW.shape
        patches = pixels_BCHW.unflatten(3, (W // PATCH, PATCH)).unflatten(2, (H // PATCH, PATCH))
        rows = patches.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, 3 * PATCH**2)
        shapes = torch.tensor([[H // PATCH, W // PATCH]] * B)
        return model(rows, torch.ones(rows.shape[:2], dtype=torch.int64), shapes).last_hidden_state
    resized = {} if family.startswith("dinov2") else {"interpolate_pos_encoding": True}
    states_BTD = model(pixel_values=pixels_BCHW, **resized).last_hidden_state
    # CLIP norms the class token alone.
    return model.post_layernorm(states_BTD) if family == "clip_vision_model" else states_BTD


@pytest.mark.parametrize("name", MODELS)
def test_states_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = new_model(name)
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    for size in (SIZE, SIZE + PATCH, SIZE - 2 * PATCH):
        pixels_BCHW = torch.randn(2, 3, size, size)
        expected_BTD = reference(model, pixels_BCHW)
        found_BTD = encoder(encoder.embed(pixels_BCHW))
        assert found_BTD.shape == (2, encoder.config.num_positions(size), 32)
        assert expected_BTD.std() > 0.1
        torch.testing.assert_close(found_BTD, expected_BTD, atol=2e-5, rtol=0)
