"""The backbone's operations for training on a CPU against torch's own, values and gradients."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.model.language import load_backbone
from mtlora.ops import cpu_elementwise
from mtlora.train.cpu_backbone import PlainAttention, RMSNorm, SwiGLU, speed_up_image_training, speed_up_training
from mtlora.vision.encoder import load_encoder
from tests.mtlora.vision.models import SIZE, write_model


@settings(max_examples=30)
@given(
    B=st.integers(1, 3), K=st.integers(1, 3), per_key=st.integers(1, 3), L=st.integers(1, 9), seed=st.integers(0, 99),
    causal=st.booleans(),
)  # fmt: skip
def test_plain_attention_equals_torch(B: int, K: int, per_key: int, L: int, seed: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        # Like a model's tensors: heads after positions in memory.
        torch.randn(B, L, heads, 4, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (K * per_key, K, K)
    )
    found = PlainAttention.apply(q, k, v, 0.3, causal)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(per_key, 1), v.repeat_interleave(per_key, 1), is_causal=causal, scale=0.3
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, (q, k, v), probe), torch.autograd.grad(expected, (q, k, v), probe), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_rms_norm_equals_torch() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight, probe = torch.linspace(0.5, 2, 16), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    found = RMSNorm.apply(x, weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x, (16,), weight, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(output, x, probe)[0] for output in (found, expected)), rtol=1e-5, atol=1e-6
    )


def test_swiglu_equals_torch() -> None:
    gate, up, probe = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    found, expected = SwiGLU.apply(*inputs), torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, probe), torch.autograd.grad(expected, inputs, probe), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("wants_gradients", [True, False])
def test_a_sped_up_model_gives_the_same_values_and_gradients(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, wants_gradients: bool, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_elementwise, "runs", lambda *tensors: False)
    tokens_BL = torch.randint(0, 1000, (3, 11), generator=torch.Generator().manual_seed(0))
    outputs = []
    for fast in (False, True):
        model, _ = load_backbone(tiny_backbone, torch.float32)
        if fast:
            speed_up_training(model)
        embedded = model.get_input_embeddings()(tokens_BL).requires_grad_(wants_gradients)
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        for operation in ("PlainAttention", "RMSNorm", "SwiGLU"):
            assert (operation in graph(hidden)) == (fast and wants_gradients)
        outputs.append([hidden, *(torch.autograd.grad(hidden.sin().sum(), embedded) if wants_gradients else ())])
    for plain, fast_one in zip(*outputs, strict=True):
        torch.testing.assert_close(fast_one, plain, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("wants_gradients", [True, False])
def test_a_sped_up_encoder_gives_the_same_values_and_gradients(tmp_path: Path, wants_gradients: bool) -> None:
    folder = write_model(tmp_path)
    pixels_BCHW = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    outputs = []
    for fast in (False, True):
        encoder = load_encoder(folder)
        if fast:
            speed_up_image_training(encoder)
        embedded = encoder.embed(pixels_BCHW).detach().requires_grad_(wants_gradients)
        with torch.set_grad_enabled(wants_gradients):
            states = encoder(embedded)
        assert ("PlainAttention" in graph(states)) == (fast and wants_gradients)
        outputs.append([states, *(torch.autograd.grad(states.sin().sum(), embedded) if wants_gradients else ())])
    for plain, fast_one in zip(*outputs, strict=True):
        torch.testing.assert_close(fast_one, plain, rtol=2e-4, atol=2e-4)


def graph(tensor: torch.Tensor) -> str:
    """The names of the nodes of a tensor's gradient graph."""
    seen, nodes = set(), [tensor.grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return " ".join(node.name() for node in seen)
