"""Random adapters and batches: the engine's operator computes the formula.

The engine's own `add_lora` loads the adapters from disk, and its own mapping gives the batch to the operator. Only the
tokens' values and the choice of blocks are the test's.

Shape suffixes: T tokens, D hidden size, G groups, N experts.
"""

import random

import hypothesis
import pytest
import torch

from mtlora.backbone import identify
from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from tests.engine._engine import lora_manager_of, running_engine
from tests.engine._models import HIDDEN_SIZE, make_adapter, make_model, path_reference

DRAWS = hypothesis.settings().max_examples
# Largest error as a share of the norm of a token's output.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def random_config(chooser: random.Random) -> MtLoRAConfig:
    num_experts = chooser.randint(1, 8)
    return MtLoRAConfig(
        r=chooser.randint(1, 32),
        lora_alpha=chooser.choice([1, 8, 32, 100]),
        num_experts=num_experts,
        num_groups=chooser.choice([1, 2, 4, 8]),
        blocks=chooser.choice(["ffn", "attention", "both"]),
        task_bias=num_experts > 1 and chooser.random() < 0.6,
    )


@pytest.fixture(scope="module", params=list(TOLERANCE))
def engine(request, tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("formula") / "model", "llama")
    with running_engine(model, dtype=request.param) as running:
        yield request.param, identify(model), running


def test_operator_computes_the_formula(engine, tmp_path):
    from vllm.forward_context import set_forward_context
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest
    from vllm.utils.torch_utils import _encode_layer_name

    from mtlora.vllm_plugin.naming import slot_path

    dtype, backbone, running = engine
    manager = lora_manager_of(running)
    blocks = manager._adapter_manager.blocks
    assert len(blocks) == 2 * backbone.num_layers
    worst, tested = 0.0, 0
    for draw in range(DRAWS):
        chooser = random.Random(draw)
        torch.manual_seed(draw)
        slots = []
        for a in range(chooser.randint(1, 3)):
            config, folder = random_config(chooser), tmp_path / f"{draw}-{a}"
            make_adapter(folder, backbone, config, num_tasks=3, seed=100 * draw + a)
            checkpoint = read_checkpoint(folder)
            for task in chooser.sample(["t0", "t1", "t2", None], chooser.randint(1, 3)):
                request = LoRARequest(f"{draw}-{a}-{task}", len(slots) + 1, slot_path(folder, task))
                assert running.llm_engine.add_lora(request)
                slots.append((request, checkpoint, task))
        T = chooser.randint(1, 16)
        # A batch uses one slot, or slots in stretches, as requests do, or slots in any order; 0 is no adapter.
        ids = chooser.choice(
            [
                [chooser.randint(1, len(slots))] * T,
                sorted(chooser.randint(0, len(slots)) for _ in range(T)),
                [chooser.randint(0, len(slots)) for _ in range(T)],
            ]
        )
        padding = chooser.choice([0, 0, 5])
        manager.set_active_adapters({slots[i - 1][0] for i in ids if i}, LoRAMapping(tuple(ids), tuple(ids)))
        for block in chooser.sample(blocks, 2):
            x_TD = torch.randn(T + padding, HIDDEN_SIZE, dtype=getattr(torch, dtype))
            y_TD = torch.zeros_like(x_TD)
            with set_forward_context(None, running.llm_engine.vllm_config):
                torch.ops.mtlora.finish_path_(y_TD, x_TD, block.step.scratch, _encode_layer_name(block.layer_name))
            expected_TD = torch.zeros(T + padding, HIDDEN_SIZE, dtype=torch.float64)
            for i in set(ids) - {0}:
                rows = torch.tensor([t for t in range(T) if ids[t] == i])
                delta = path_reference(*slots[i - 1][1:], block.block_name, x_TD[rows])
                if delta is not None:
                    expected_TD[rows] = delta
            size_T, error_T = expected_TD.norm(dim=1), (y_TD.double() - expected_TD).norm(dim=1)
            untouched = size_T == 0
            assert (error_T[untouched] == 0).all(), f"draw {draw}: rows without an adapter were changed"
            if not untouched.all():
                relative = (error_T[~untouched] / size_T[~untouched]).max().item()
                assert relative <= TOLERANCE[dtype], f"draw {draw}, {block.block_name}: relative error {relative:.2e}"
                worst, tested = max(worst, relative), tested + 1
        for request, *_ in slots:
            assert running.llm_engine.remove_lora(request.lora_int_id)
        assert not manager.store.slot_ids()
        assert not manager.store._adapters, "weights outlive their last slot"
    assert tested > DRAWS
    print(f"{dtype}: worst relative error {worst:.1e} over {tested} blocks")
