"""The plain encoder equals transformers' model of every family, at every size."""

from pathlib import Path

import pytest
import torch

from mtlora.vision.encoder import load_encoder
from mtlora.vision.families import read_config
from mtlora.vision.rotary import image_lengths, image_rotation, rotation
from tests.mtlora.vision.models import MODELS, PATCH, SIZE, new_model, write_model


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
    resized = {} if family.startswith("dino") else {"interpolate_pos_encoding": True}
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


def test_images_behind_one_another_and_padding_have_the_rotary_angles_of_each_alone(tmp_path: Path) -> None:
    config = read_config(write_model(tmp_path, "dinov3"))
    lengths = [config.num_positions(size) for size in (SIZE, 3 * PATCH, SIZE, PATCH)]
    padding = torch.zeros(3, dtype=torch.int64)
    positions_T = torch.cat([*map(torch.arange, lengths), padding])
    lengths_T = image_lengths(positions_T)
    assert lengths_T.tolist() == [length for length in lengths for _ in range(length)] + [1, 1, 1]
    found = rotation(config, positions_T, lengths_T)
    alone = [image_rotation(config, length, torch.float32, torch.device("cpu")) for length in lengths]
    for name, found_TH, parts in zip(("cos", "sin"), found, zip(*alone, strict=True), strict=True):
        assert torch.equal(found_TH[:-3], torch.cat(parts)), name
        assert torch.equal(found_TH[-3:], torch.full_like(found_TH[-3:], float(name == "cos"))), name


def test_a_backbone_of_rotary_positions_passes_gradients_on_after_an_evaluation(tmp_path: Path) -> None:
    encoder = load_encoder(write_model(tmp_path, "dinov3"))
    x_BTD = encoder.embed(torch.randn(1, 3, SIZE, SIZE))
    with torch.inference_mode():
        encoder(x_BTD)
    encoder(x_BTD.requires_grad_()).sum().backward()
    assert x_BTD.grad is not None
    assert x_BTD.grad.abs().min() > 0
