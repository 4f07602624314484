"""A Llama-shaped decoder with the path beside every FFN block: compiled layer by layer, captured in one graph.

It runs the work of an engine's step without an engine: norms, rotary embedding, a KV cache of fixed size, products,
the output layer. Weights are random. Layers share one compiled function, which takes a layer's weights as arguments.

Shape suffixes: T tokens, D hidden size, H heads, K KV heads, C positions of the cache, E size of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.gpu.adapters import Adapters
from benchmarks.gpu.backbones import Backbone

_EPSILON = 1e-5

# Keep the library for the life of the process, because its operators end with it.
_LIBRARY = torch.library.Library("bench_gpu", "FRAGMENT")
_LIBRARY.define("begin(Tensor x, Tensor(a!) scratch, Tensor block) -> ()")
_LIBRARY.define("finish_(Tensor(a!) y, Tensor x, Tensor(b!) scratch, Tensor block) -> ()")


class Halves(NamedTuple):
    """What the operators run for a block: before F as begin(x, block), after it as finish(y, x, block)."""

    begin: Callable[[torch.Tensor, int], None]
    finish: Callable[[torch.Tensor, torch.Tensor, int], None]


_running: list[Halves] = []


def run_with(halves: Halves) -> None:
    """Choose what the operators run."""
    _running[:] = [halves]


def on_one_stream(adapters: Adapters) -> Halves:
    """The kernels of both halves, on the same stream as F."""
    return Halves(adapters.path.begin, lambda y_TD, x_TD, block: adapters.path.finish_(y_TD, block))


def on_two_streams(adapters: Adapters) -> Halves:
    """The shrink on a second stream, beside F."""
    side = torch.cuda.Stream()

    def begin(x_TD: torch.Tensor, block: int) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            adapters.path.begin(x_TD, block)

    def finish(y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
        torch.cuda.current_stream().wait_stream(side)
        adapters.path.finish_(y_TD, block)

    return Halves(begin, finish)


def in_float64(adapters: Adapters, row_T: np.ndarray) -> Halves:
    """The formula in float64, for the rows of a step; no graph can hold it."""

    def finish(y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
        y_TD.copy_(y_TD.double() + adapters.oracle(x_TD, block, row_T))

    return Halves(lambda x_TD, block: None, finish)


def _begin(x: torch.Tensor, scratch: torch.Tensor, block: torch.Tensor) -> None:
    _running[0].begin(x, int(block))


def _finish(y: torch.Tensor, x: torch.Tensor, scratch: torch.Tensor, block: torch.Tensor) -> None:
    _running[0].finish(y, x, int(block))


for _name, _function in (("begin", _begin), ("finish_", _finish)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bench_gpu::{_name}", lambda *tensors: None, lib=_LIBRARY)


class Layer(NamedTuple):
    """A layer's weights, its part of the KV cache [T, K, C, E], and its number as a tensor on the host."""

    norm_D: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    ffn_norm_D: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    number: torch.Tensor


def _normed(x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    x32_TD = x_TD.float()
    scale_T1 = torch.rsqrt(x32_TD.square().mean(-1, keepdim=True) + _EPSILON)
    return (x32_TD * scale_T1).to(x_TD.dtype) * weight_D


def _rotated(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    left, right = x_THE.chunk(2, dim=-1)
    return x_THE * cos_TE[:, None] + torch.cat((-right, left), dim=-1) * sin_TE[:, None]


class Decoder:
    """The decoder. `step` is a decode step of one token a sequence, or the prefill of one prompt.

    layers: how many of the backbone's there are.
    """

    dtype = torch.bfloat16
    # Positions of the KV cache in decode steps.
    context = 256

    def __init__(self, backbone: Backbone, layers: int, device: torch.device) -> None:
        self.backbone, self.device = backbone, device
        D, wide = backbone.hidden, backbone.intermediate

        def weight(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, device=device) / columns**0.5).to(self.dtype)

        self.layers = [
            Layer(
                torch.ones(D, device=device, dtype=self.dtype), weight(backbone.qkv, D),
                weight(D, backbone.heads * backbone.head), torch.ones(D, device=device, dtype=self.dtype),
                weight(2 * wide, D), weight(D, wide), torch.tensor(number),
            )
            for number in range(layers)
        ]  # fmt: skip
        self.output = weight(backbone.vocabulary, D)
        self.scratch = torch.zeros(1, device=device)

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads."""
        return sum(t.nbytes for layer in self.layers for t in layer[:-1]) + self.output.nbytes

    def caches(self, sequences: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """KV caches for decode steps, a pair a layer."""
        size = (sequences, self.backbone.kv_heads, self.context, self.backbone.head)
        return [
            (torch.randn(size, device=self.device).to(self.dtype), torch.randn(size, device=self.device).to(self.dtype))
            for _ in self.layers
        ]

    def layer_function(self, *, with_path: bool, decode: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """(x, residual) after a layer, as a function to compile."""
        H, K, E = self.backbone.heads, self.backbone.kv_heads, self.backbone.head

        def run(
            x_TD: torch.Tensor, residual_TD: torch.Tensor, layer: Layer, cache: tuple[torch.Tensor, torch.Tensor],
            cos_TE: torch.Tensor, sin_TE: torch.Tensor, scratch: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
            residual_TD = residual_TD + x_TD
            x_TD = _normed(residual_TD, layer.norm_D)
            q, k, v = F.linear(x_TD, layer.qkv).view(len(x_TD), H + 2 * K, E).split([H, K, K], dim=1)
            q, k = _rotated(q, cos_TE, sin_TE), _rotated(k, cos_TE, sin_TE)
            if decode:
                keys_TKCE, values_TKCE = cache
                keys_TKCE[:, :, -1], values_TKCE[:, :, -1] = k, v
                # The heads of a group of queries are the rows of one product.
                attended = F.scaled_dot_product_attention(q.view(-1, K, H // K, E), keys_TKCE, values_TKCE)
            else:
                q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                attended = attended.squeeze(0).transpose(0, 1)
            residual_TD = residual_TD + F.linear(attended.reshape(len(x_TD), H * E), layer.out)
            x_TD = _normed(residual_TD, layer.ffn_norm_D)
            if with_path:
                torch.ops.bench_gpu.begin(x_TD, scratch, layer.number)
            gate, up = F.linear(x_TD, layer.gate_up).chunk(2, dim=-1)
            y_TD = F.linear(F.silu(gate) * up, layer.down)
            if with_path:
                torch.ops.bench_gpu.finish_(y_TD, x_TD, scratch, layer.number)
            return y_TD, residual_TD

        return run


class Step:
    """A step of fixed size over static tensors. caches: for a decode step; None for the prefill of one prompt.

    path: whether it runs the halves that `run_with` chose. compiled: a backend of torch.compile, None for plain torch
    ops. captured: whether a CUDA graph holds it.
    """

    def __init__(
        self, decoder: Decoder, inputs_TD: torch.Tensor, caches: list[tuple[torch.Tensor, torch.Tensor]] | None,
        *, path: bool, compiled: str | None, captured: bool,
    ) -> None:  # fmt: skip
        self.decoder, self.inputs_TD = decoder, inputs_TD
        T, E = len(inputs_TD), decoder.backbone.head
        self._decode = caches is not None
        none = torch.empty(0, device=decoder.device)
        self._caches = caches or [(none, none)] * len(decoder.layers)
        positions_T = torch.arange(T) if not self._decode else torch.full((T,), decoder.context - 1)
        angles_TE = positions_T[:, None] * 10000 ** (-torch.arange(0, E, 2) / E).repeat(2)
        self._cos, self._sin = (
            f(angles_TE).to(decoder.device, decoder.dtype) for f in (torch.cos, torch.sin)
        )  # fmt: skip
        self._layer = decoder.layer_function(with_path=path, decode=self._decode)
        if compiled:
            self._layer = torch.compile(self._layer, backend=compiled, fullgraph=True, dynamic=False)
        self._graph: torch.cuda.CUDAGraph | None = None
        if captured:
            self._capture()

    def run(self) -> None:
        """Run the step. hidden_TD: states before the output layer; a prompt gets logits for its last token alone."""
        decoder = self.decoder
        x_TD, residual_TD = self.inputs_TD, torch.zeros_like(self.inputs_TD)
        for layer, cache in zip(decoder.layers, self._caches, strict=True):
            x_TD, residual_TD = self._layer(x_TD, residual_TD, layer, cache, self._cos, self._sin, decoder.scratch)
        x_TD = _normed(residual_TD + x_TD, decoder.layers[-1].norm_D)
        self.hidden_TD = x_TD
        self.logits = F.linear(x_TD if self._decode else x_TD[-1:], decoder.output)

    def replay(self) -> None:
        """Run the graph; without one, the step."""
        if self._graph is None:
            self.run()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.run()
