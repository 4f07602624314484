"""A captured graph serves any later mix: the launches of a warm-up, run again over other plans, tables and inputs.

The interpreter runs what a card's graph would hold. Scratch space, padding and what lies behind plans are poisoned.
"""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.cases import Shape
from mtlora.ops import triton_gpu  # noqa: F401  these tests run the interpreter, which makes them slow ones
from mtlora.ops.plan import Header
from mtlora.ops.tuning import KernelConfig
from tests.mtlora.ops.replay import Adapter, Engine


def config_for(D: int, shapes: list[Shape], dtype: torch.dtype, **changes: object) -> KernelConfig:
    """A config whose largest adapter is just as large as these."""
    sizes = {
        "num_blocks": 2, "max_adapters": 3, "max_tokens": 24, "max_rank": max(s.r for s in shapes),
        "max_experts": max(s.N for s in shapes), "max_groups": max(s.G for s in shapes), "num_sms": 1, "max_parts": 2,
    } | changes  # fmt: skip
    return KernelConfig(D, dtype, **sizes)  # type: ignore[arg-type]


# Hidden size, shapes of adapters, dtype, padded tokens, tokens of a step.
SIZES = {
    "common": (288, [Shape(16, 8, 4, 2), Shape(4, 1, 1)], torch.bfloat16, 24, 20),
    "odd-groups": (144, [Shape(5, 3, 16, 1)], torch.float16, 20, 5),
    "large-rank": (256, [Shape(128, 2, 2)], torch.bfloat16, 20, 3),
    "many-experts": (128, [Shape(8, 64, 1, 1)], torch.float32, 2, 2),
    "wide": (1024, [Shape(4, 4, 2)], torch.bfloat16, 17, 1),
    "prefill": (288, [Shape(16, 4, 2, 1), Shape(4, 2, 1)], torch.float16, 600, 70),
    "prefill-in-parts": (640, [Shape(4, 2, 2)], torch.bfloat16, 600, 10),
}
# More multiprocessors than `config_for` gives: the plan then asks for more parts than tiles of 64 tokens allow.
CHANGES = {"prefill-in-parts": {"num_sms": 16, "max_parts": 8}}
sizes = pytest.mark.parametrize("name", list(SIZES))


@sizes
def test_replays_equal_the_formula(name: str) -> None:
    D, shapes, dtype, padded, tokens = SIZES[name]
    changes = {"num_blocks": 2 if name == "common" else 1, "max_tokens": padded} | CHANGES.get(name, {})
    config = config_for(D, shapes, dtype, **changes)
    engine = Engine(config, padded)
    captured = engine.graph.signature(engine.static)
    rng = np.random.default_rng(0)

    def adapter(number: int) -> Adapter:
        # The second has a path in one block alone.
        shape = shapes[number % len(shapes)]
        return Adapter([shape, None if number == 1 else shape][: config.num_blocks], D, dtype, seed=number)

    def mix(tokens: int, choices: tuple[int, ...] = (-1, 0, 1, 2)) -> tuple[list[int], list[int]]:
        rows = rng.choice(choices, tokens).tolist()
        held = [engine.adapters[row].references[0] if row >= 0 else None for row in rows]
        most = [0 if a is None or a.bias_bGN is None else len(a.bias_bGN) for a in held]
        # An adapter without biases never reads a bias row, even if a slot names one.
        return rows, [int(rng.integers(-1, n)) if n else 1 for n in most]

    engine.set([], [])
    engine.step(0)  # as captured: an empty plan over an empty table
    for row in range(3):
        engine.place(row, adapter(row))
    engine.set(*mix(tokens))
    if name in CHANGES:
        assert engine.plan.words_W[Header.PARTS] > engine.graph.launched[0][0].constants["MAX_PARTS"]
    engine.step(1)
    if name == "common":
        engine.place(0, adapter(3))
        engine.place(1, None)
        engine.set(*mix(padded, (-1, 0, 2)))
        engine.step(2)  # an adapter was replaced at its place, another left
    engine.set([-1] * tokens, [-1] * tokens)
    engine.step(3)
    assert engine.graph.signature(engine.static) == captured


def test_launches_depend_on_padded_tokens_and_config_alone() -> None:
    shape = Shape(4, 2, 2)
    config = config_for(64, [Shape(8, 4, 4)], torch.bfloat16, num_blocks=1, max_tokens=1024)
    signatures = {}
    for padded, filled in itertools.product((1, 16, 17, 512, 513, 1024), (False, True)):
        engine = Engine(config, padded)
        if filled:
            engine.place(2, Adapter([shape], 64, torch.bfloat16, seed=0))
            engine.set([2] * padded, [-1] * padded)
            engine.graph.work.clear()
            engine.graph.launched.clear()
            with engine.graph.capture():
                engine.launch()
        signature = engine.graph.signature(engine.static)
        assert all("static" in str(v) for *_, values in signature for k, v in values if k not in NUMBERS)
        assert signatures.setdefault(padded, signature) == signature
    kernels = {(n, str(g), str(c), w, s) for signature in signatures.values() for n, g, c, w, s, _ in signature}
    # Three shapes of each kernel: more are never compiled.
    assert len(kernels) <= 6


NUMBERS = ("block", "num_tokens", "x_stride", "y_stride")


def test_a_larger_plan_than_the_graph_writes_nothing_beyond_it() -> None:
    """A plan that is left from a larger step names tokens that a smaller graph does not have."""
    config = config_for(64, [Shape(4, 2, 2, 1)], torch.float32, num_blocks=1, max_tokens=40)
    engine = Engine(config, 8, rows_behind=40)
    for row in range(3):
        engine.place(row, Adapter([Shape(4, 2, 2, 1)], 64, torch.float32, seed=row))
    engine.set([t % 3 for t in range(40)], [0] * 40)
    engine.step(0)


def test_largest_adapters_fill_the_scratch_space() -> None:
    largest = Shape(16, 4, 4, 1)
    config = config_for(512, [largest], torch.bfloat16, num_blocks=1, max_parts=4, num_sms=16, max_tokens=17)
    engine = Engine(config, 17)
    engine.place(2, Adapter([largest], 512, torch.bfloat16, seed=0))
    engine.set([2] * 17, [0] * 17)
    assert engine.plan.words_W[Header.PARTS] == 4
    engine.step(0)


@pytest.mark.parametrize("padded", [16, 600])
def test_the_kernel_writes_down_the_routing_of_the_sampled_tile(padded: int) -> None:
    shape = Shape(4, 20, 3, 2)
    # More experts than the adapter's: rows of samples are longer than its routing.
    config = config_for(96, [shape], torch.float32, max_tokens=padded, max_experts=24)
    engine = Engine(config, padded)
    adapter = Adapter([shape, shape], 96, torch.float32, seed=0)
    engine.place(1, adapter)
    engine.place(2, Adapter([shape, shape], 96, torch.float32, seed=1))
    samples = engine.path.buffers.samples
    samples.fill_(-1)
    engine.set([-1] + [1] * 12 + [2], [0, 1, -1] * 4 + [0, 0], sample=(1, 0))
    engine.step(0)
    reference = adapter.references[1]
    assert reference is not None
    assert reference.bias_bGN is not None
    logits_TGN = (engine.x_LTD[1, 1:9].cpu() @ reference.lora_route.t()).view(8, 3, 20)
    for t in range(8):
        if (bias_row := engine.bias_rows[1 + t]) >= 0:
            logits_TGN[t] += reference.bias_bGN[bias_row]
    torch.testing.assert_close(samples[:, :60].cpu().view(8, 3, 20), logits_TGN.softmax(-1), atol=1e-5, rtol=0)
    assert samples[:, 60:].numel()
    assert (samples[:, 60:] == -1).all()
    samples.fill_(-1)
    engine.set([-1] + [1] * 12, [0] * 13)
    engine.step(1)
    assert (samples == -1).all()


@pytest.mark.parametrize("padded", [16, 1024])
def test_256_slots_cost_what_one_does(padded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts loop iterations that load weights, and all iterations, with one live adapter."""
    shape, turns = Shape(4, 2, 2), {}
    for slots in (1, 256):
        config = config_for(256, [shape], torch.bfloat16, num_blocks=1, max_adapters=slots, max_tokens=padded)
        engine = Engine(config, padded)
        engine.place(slots - 1, Adapter([shape], 256, torch.bfloat16, seed=0))
        engine.set([slots - 1] * 5, [-1] * 5)
        with monkeypatch.context() as patch:
            turns[slots] = count_loads(engine, patch)
        engine.step(0)
    assert turns[256] == turns[1]
    assert turns[1]["weights"] > 0


def count_loads(engine: Engine, patch: pytest.MonkeyPatch) -> dict[str, int]:
    """Loads of a replay through the interpreter: of weights, and of anything."""
    from triton.runtime import interpreter

    held = engine.adapters[-1]
    assert held is not None
    first = held.rows._bytes.data_ptr()
    last = first + len(held.rows._bytes)
    counts = {"weights": 0, "all": 0}
    load = interpreter._interpreter.load

    def counting(pointers: np.ndarray, mask: np.ndarray, *rest: object) -> np.ndarray:
        counts["all"] += 1
        counts["weights"] += bool(((pointers >= first) & (pointers < last) & mask).any())
        return load(pointers, mask, *rest)

    patch.setattr(interpreter._interpreter, "load", counting)
    engine.graph.replay()
    return counts
