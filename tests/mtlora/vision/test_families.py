"""Vision folders: every family's configuration and names, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mtlora.backbone import identify
from mtlora.errors import BackboneError
from mtlora.vision.encoder import VisionEncoder, load_encoder, pool
from mtlora.vision.families import encoder_name, encoder_tensors, read_config, read_normalisation
from tests.mtlora.vision.models import MODELS, PATCH, SIZE, new_model, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2."""
    return write_model(tmp_path_factory.mktemp("dinov2"))


def changed(folder: Path, out: Path, **config: Any) -> Path:
    """A copy whose config.json differs."""
    out.mkdir()
    (out / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    return out


def test_names_of_older_releases_and_of_models_with_heads_are_the_same(folder: Path, tmp_path: Path) -> None:
    expected = load_encoder(folder).state_dict()
    model = new_model("dinov2")
    (new := tmp_path / "new").mkdir()
    # Names in memory, which later releases may save.
    state = {f"dinov2.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state | {"classifier.weight": torch.zeros(2, 3)}, new / "model.safetensors")
    (new / "config.json").write_text((folder / "config.json").read_text())
    assert set(load_file(folder / "model.safetensors")) != set(state)
    found = load_encoder(new).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_tower_of_a_model_of_image_and_text_is_found(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    tower = new_model(family)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 9,
    }
    config = AutoConfig.for_model(
        family, vision_config=tower.config.to_dict(), text_config=sizes | {"projection_dim": 8}
    )
    model = AutoModel.from_config(config).eval()
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(tmp_path)
    identity = identify(tmp_path)
    assert (identity.hidden_size, identity.num_layers) == (32, 2)
    assert identity.architecture == type(model).__name__
    pixels_BCHW = torch.randn(1, 3, SIZE, SIZE)
    states_BTD = tower(pixel_values=pixels_BCHW).last_hidden_state
    expected_BTD = tower.post_layernorm(states_BTD) if family == "clip" else states_BTD
    encoder = load_encoder(tmp_path)
    torch.testing.assert_close(encoder(encoder.embed(pixels_BCHW)), expected_BTD, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_identity_has_the_towers_sizes(name: str, tmp_path: Path) -> None:
    identity = identify(write_model(tmp_path, name))
    assert (identity.hidden_size, identity.num_layers) == (32, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_is_frozen_and_of_the_asked_dtype(folder: Path, dtype: torch.dtype) -> None:
    encoder = load_encoder(folder, dtype)
    assert not encoder.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.features(torch.randn(1, 3, SIZE, SIZE), "cls_mean").dtype == dtype


def test_caches_the_positions_of_an_image_size(folder: Path) -> None:
    encoder = load_encoder(folder)
    first = encoder.embeddings._positions(2)
    assert encoder.embeddings._positions(2) is first
    with torch.no_grad():
        encoder.embeddings.positions += 1
    torch.testing.assert_close(encoder.embeddings._positions(2), first + 1)


def test_pooling_takes_the_first_position_and_the_patches_mean() -> None:
    states_BTD = torch.arange(24.0).view(2, 4, 3)
    cls, mean = pool(states_BTD, "cls", 2), pool(states_BTD, "mean", 2)
    assert torch.equal(cls, states_BTD[:, 0])
    assert torch.equal(mean, states_BTD[:, 2:].mean(1))
    assert torch.equal(pool(states_BTD, "cls_mean", 2), torch.cat([cls, mean], 1))
    assert torch.equal(pool(states_BTD, "mean", 0), states_BTD.mean(1))
    with pytest.raises(BackboneError, match="pooling 'cls': this backbone has no class token; allowed: mean"):
        pool(states_BTD, "cls", 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 56, 70), "expected squares, found 56 x 70"),
        ((1, 3, 57, 57), "expected a multiple"),
        ((1, 3, 0, 0), "0 x 0"),
    ],
)
def test_refuses_images_that_patches_do_not_fill(folder: Path, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        load_encoder(folder).embed(torch.zeros(shape))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type: found 'llama'; allowed for images: vit, dinov2, "),
        ({"model_type": None}, "found None"),
        ({"patch_size": [14, 16]}, r"patch_size: expected a square, found \[14, 16\]"),
        ({"image_size": [56, 70]}, r"image_size: expected a square, found \[56, 70\]"),
        ({"num_channels": 1}, "expected patches of 3 channels, found 1"),
        ({"hidden_size": 64}, r"tensor embeddings.class_token: expected shape \[64\], found \[32\]"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.self_attn.o_proj.scale: expected in a dinov2 backbone"),
        ({"image_size": 70}, r"tensor embeddings.positions: expected shape \[26, 32\], found \[17, 32\]"),
        ({"patch_size": 7}, "tensor embeddings.positions: expected shape"),
        ({"use_swiglu_ffn": True}, "tensor model.layers.0.mlp.gate_proj.weight: expected"),
        ({"hidden_act": "mish"}, "hidden_act: expected gelu, .* found 'mish'"),
        ({"hidden_size": "wide"}, "config.json"),
    ],
)
def test_refuses_folders_that_do_not_fit(folder: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load_encoder(changed(folder, tmp_path / "x", **config))
    assert str(tmp_path / "x") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("dinov3", {"num_attention_heads": 16}, "found 16 heads of 32 dimensions in all; allowed with rotary"),
        ("dinov3", {"use_gated_mlp": True}, "tensor model.layers.0.mlp.gate_proj.weight: expected"),
        ("dinov3 with gates", {"use_gated_mlp": False}, "tensor model.layers.0.mlp.fc1.weight: expected"),
        ("dinov3", {"key_bias": True}, "tensor model.layers.0.self_attn.k_proj.bias: expected in a dinov3_vit"),
    ],
)
def test_refuses_dinov3_folders_that_do_not_fit(
    tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        load_encoder(changed(write_model(tmp_path / "model", name), tmp_path / "x", **config))


@pytest.mark.parametrize("read", [read_config, load_encoder, identify])
def test_refuses_a_convolutional_dinov3_and_names_what_is_allowed(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    from transformers import DINOv3ConvNextConfig

    DINOv3ConvNextConfig(architectures=["DINOv3ConvNextModel"]).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"model_type: found 'dinov3_convnext'.*; allowed.* images.* dinov3_vit, "):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}" * 100, b"\xff" * 100])
def test_refuses_unreadable_weights(folder: Path, tmp_path: Path, content: bytes) -> None:
    out = changed(folder, tmp_path / "x")
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(BackboneError, match="unreadable weights"):
        load_encoder(out)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '"dinov2"'])
def test_refuses_unreadable_configurations(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=re.escape(str(tmp_path))):
        read_config(tmp_path)


@given(st.text(max_size=60) | st.sampled_from(["dinov2.encoder.layer.0.mlp.fc1.weight", "head.layernorm.weight"]))
def test_any_name_is_the_encoders_or_nobodys(name: str) -> None:
    found = encoder_name(name)
    assert found is None or found.startswith(("embeddings.", "model."))
    assert encoder_name("head.layernorm.weight") is None
    assert encoder_name("text_model.encoder.layers.0.mlp.fc1.weight") is None


@given(st.data())
def test_any_lost_or_bent_tensor_is_named(folder: Path, data: st.DataObject) -> None:
    config, tensors = read_config_once(folder), dict(load_once(folder))
    name = data.draw(st.sampled_from([name for name in sorted(tensors) if encoder_name(name)]))
    if data.draw(st.booleans()):
        del tensors[name]
    else:
        tensors[name] = tensors[name][..., :-1]
    with pytest.raises(BackboneError, match=re.escape(str(encoder_name(name)))):
        encoder_tensors(config, tensors.items())


_ONCE: dict[Any, Any] = {}


def read_config_once(folder: Path) -> Any:
    return _ONCE.setdefault(("config", folder), read_config(folder))


def load_once(folder: Path) -> dict[str, torch.Tensor]:
    if folder not in _ONCE:
        _ONCE[folder] = load_file(folder / "model.safetensors")
    return _ONCE[folder]


def test_normalisation_is_the_folders_or_the_familys(folder: Path, tmp_path: Path) -> None:
    assert read_normalisation(folder)[0] == (0.485, 0.456, 0.406)
    out = changed(folder, tmp_path / "x")
    path = out / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0, 0.5, 1], "image_std": [1, 2, 3]}))
    assert read_normalisation(out) == ((0.0, 0.5, 1.0), (1.0, 2.0, 3.0))
    path.write_text(json.dumps({"do_normalize": False}))
    assert read_normalisation(out) == ((0, 0, 0), (1, 1, 1))
    for wrong in (
        "{",
        "[]",
        "{}",
        '{"image_mean": [0], "image_std": [1]}',
        '{"image_mean": [0,0,0], "image_std": [1,0,1]}',
    ):
        path.write_text(wrong)
        with pytest.raises(BackboneError, match=r"preprocessor_config\.json"):
            read_normalisation(out)


def test_num_positions_of_small_and_whole_images(folder: Path) -> None:
    config = read_config(folder)
    assert [config.num_positions(size) for size in (PATCH, SIZE)] == [2, 17]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in VisionEncoder(config).parameters()) > 0
