"""One plain torch encoder for all families of vision backbones: patches in, states out.

`model.layers.N.self_attn` and `model.layers.N.mlp` are the blocks that adapters find, as in a language model.

Shape suffixes: B images, C channels, H rows and W columns of pixels, G patches of a side, T positions (class token,
registers, patches), D hidden size, N heads, K size of a head, F size of a feature.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from mtlora.errors import BackboneError
from mtlora.vision.families import VisionConfig, encoder_tensors, read_config
from mtlora.vision.image_input import Pooling
from mtlora.vision.rotary import image_rotation, rotate


def load_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> "VisionEncoder":
    """The frozen encoder of a Hugging Face folder, in evaluation mode. Raises BackboneError."""
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    tensors: list[tuple[str, torch.Tensor]] = []
    try:
        with torch.device("meta"):
            encoder = VisionEncoder(config)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors += [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118  no mapping
        state = {name: tensor.to(dtype) for name, tensor in encoder_tensors(config, tensors).items()}
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{folder}: unreadable weights ({error})") from error
    except BackboneError as error:
        raise BackboneError(f"{folder}: {error}") from None
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False)


def pool(states_BTD: torch.Tensor, pooling: Pooling, num_prefix: int) -> torch.Tensor:
    """An image's feature [B, F]: the first position, the patches' mean, or both, in this order.

    num_prefix: positions before the patches. Raises BackboneError for a class token that is not there.
    """
    mean_BD = states_BTD[:, num_prefix:].mean(1)
    if pooling == "mean":
        return mean_BD
    if num_prefix == 0:
        raise BackboneError(f"pooling {pooling!r}: this backbone has no class token; allowed: mean")
    cls_BD = states_BTD[:, 0]
    return cls_BD if pooling == "cls" else torch.cat([cls_BD, mean_BD], dim=1)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's approximation of a GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
}


class Embeddings(nn.Module):
    """Patches, class token and registers, with stored positions: what enters the first layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        D, traits = config.hidden_size, config.traits
        if traits.class_token:
            self.class_token = nn.Parameter(torch.empty(D))
        if config.num_registers:
            self.registers = nn.Parameter(torch.empty(config.num_registers, D))
        if config.rope_theta is None:
            self.positions = nn.Parameter(torch.empty(int(traits.class_token) + config.grid_size**2, D))
        self.patches = nn.Conv2d(3, D, config.patch_size, stride=config.patch_size)
        self.norm = nn.LayerNorm(D, eps=config.eps) if traits.input_norm else nn.Identity()
        # Positions [T, D] of a size, and what they were made from.
        self._made: dict[int, tuple[int, torch.Tensor]] = {}

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] of square images, normalised by the backbone's mean and spread. Raises BackboneError."""
        B, _, H, W = pixels_BCHW.shape
        if H != W:
            raise BackboneError(f"images: expected squares, found {H} x {W} pixels")
        self.config.num_positions(H)
        x_BTD = self.patches(pixels_BCHW.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        if self.config.traits.class_token:
            x_BTD = torch.cat([self.class_token.expand(B, 1, -1), x_BTD], dim=1)
        if self.config.rope_theta is None:
            x_BTD = x_BTD + self._positions(H // self.config.patch_size)
        if self.config.num_registers:
            x_BTD = torch.cat([x_BTD[:, :1], self.registers.expand(B, -1, -1), x_BTD[:, 1:]], dim=1)
        normed_BTD: torch.Tensor = self.norm(x_BTD)
        return normed_BTD

    def _positions(self, G: int) -> torch.Tensor:
        """The positions of G x G patches, interpolated, and of the class token."""
        if self.config.grid_size == G:
            return self.positions
        version = self.positions._version
        if (made := self._made.get(G)) and made[0] == version and made[1].device == self.positions.device:
            return made[1]
        first, grid = self.positions.split([len(self.positions) - self.config.grid_size**2, self.config.grid_size**2])
        square_1DGG = grid.float().view(1, self.config.grid_size, self.config.grid_size, -1).permute(0, 3, 1, 2)
        traits = self.config.traits
        resized_1DGG = functional.interpolate(
            square_1DGG, size=(G, G), mode=traits.interpolation, antialias=traits.antialias, align_corners=False
        )
        positions = torch.cat([first, resized_1DGG.flatten(2)[0].T.to(grid.dtype)])
        if not self.positions.requires_grad:
            self._made[G] = version, positions
        return positions


class SelfAttention(nn.Module):
    """Every position attends to every position. `attend`: q, k, v [B, N, T, K] to [B, N, T, K]."""

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.attend = functional.scaled_dot_product_attention
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output [B, T, D] of the block for its normalised input [B, T, D]."""
        q_BNTK, k_BNTK, v_BNTK = (
            linear(hidden_states).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.rope_theta is not None:
            rotary = image_rotation(self.config, q_BNTK.shape[2], q_BNTK.dtype, q_BNTK.device)
            q_BNTK, k_BNTK = rotate(q_BNTK, *rotary), rotate(k_BNTK, *rotary)
        mixed_BNTK = self.attend(q_BNTK, k_BNTK, v_BNTK)
        output_BTD: torch.Tensor = self.o_proj(mixed_BNTK.transpose(1, 2).flatten(2))
        return output_BTD


class MLP(nn.Module):
    """Two linear layers, or three with a gate."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D, M = config.hidden_size, config.intermediate_size
        self.gated = config.gated
        if self.gated:
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, M), nn.Linear(D, M), nn.Linear(M, D)
        else:
            self.fc1, self.fc2 = nn.Linear(D, M), nn.Linear(M, D)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output [B, T, D] of the block for its normalised input [B, T, D]."""
        y: torch.Tensor
        if self.gated:
            y = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        else:
            y = self.fc2(self.activation(self.fc1(x)))
        return y


class Layer(nn.Module):
    """A layer before whose blocks the norms stand."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.self_attn = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer."""
        x_BTD = x_BTD + self.self_attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class Stack(nn.Module):
    """The layers and the final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.eps)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """States after the final norm."""
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        states_BTD: torch.Tensor = self.norm(x_BTD)
        return states_BTD


class VisionEncoder(nn.Module):
    """A vision backbone. `embeddings` stay outside an engine, which runs `model`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise BackboneError(f"hidden_act: expected {', '.join(ACTIVATIONS)}, found {config.activation!r}")
        self.config = config
        self.embeddings = Embeddings(config)
        self.model = Stack(config)

    def embed(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] of normalised square images, T = `config.num_positions(size)`. Raises BackboneError."""
        x_BTD: torch.Tensor = self.embeddings(pixels_BCHW)
        return x_BTD

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] after the final norm."""
        states_BTD: torch.Tensor = self.model(x_BTD)
        return states_BTD

    def features(self, pixels_BCHW: torch.Tensor, pooling: Pooling) -> torch.Tensor:
        """Features [B, F] of normalised square images. Raises BackboneError."""
        return pool(self(self.embed(pixels_BCHW)), pooling, self.config.num_prefix)
