"""The two operators under a compiler: no copy of y, order kept, one graph for all layers.

Shape suffixes: T rows of the batch, D hidden size.
"""

import re
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

D, LAYERS, TOKENS = 32, 3, 5


class Product(nn.Module):
    """A block that is one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_DD = nn.Parameter(torch.randn(D, D) / D**0.5, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight_DD


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Wrapped blocks over a step that begins: `begin` keeps x in `scratch`, `finish_` adds 2 x + block number to y."""
    from mtlora.ops.table import AdapterTable
    from mtlora.vllm_plugin import block
    from mtlora.vllm_plugin.step import StepMapping

    class Step(StepMapping):
        begins = True

        def _take(self, row_T: np.ndarray, bias_row_T: np.ndarray, slots: dict[int, Any], *, any_slot: bool) -> None:
            self.scratch = torch.zeros(TOKENS, D)
            self.calls: list[tuple[str, int, bool | None]] = []

        def begin(self, x_TD: torch.Tensor, block: int, *, beside: bool) -> None:
            self.calls.append(("begin", block, beside))
            self.scratch.copy_(x_TD)

        def finish_(self, y_TD: torch.Tensor, x_TD: torch.Tensor, block: int) -> None:
            self.calls.append(("finish", block, None))
            assert torch.equal(self.scratch, x_TD)
            y_TD += 2 * x_TD + block

    step = Step(AdapterTable(LAYERS, 1, hidden_size=D, dtype=torch.float32, device=torch.device("cpu")))
    names = [f"layers.{i}.{module}" for i, module in enumerate(["mlp", "self_attn", "mlp"])]
    blocks = [block.RoutedBlock(Product(), i, name, f"mtlora.{name}", step) for i, name in enumerate(names)]
    context = SimpleNamespace(no_compile_layers={b.layer_name: b for b in blocks})
    monkeypatch.setattr(block, "get_forward_context", lambda: context)
    torch._dynamo.reset()
    return SimpleNamespace(step=step, blocks=blocks)


def run(blocks: list[Any], x_TD: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x_TD = block(x_TD)
    return x_TD


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_compiled_code_copies_nothing_and_keeps_the_order(stack: Any) -> None:
    from torch._inductor.utils import run_and_get_code

    x_TD = torch.randn(TOKENS, D)
    with torch.inference_mode():
        expected_TD, eager_calls = run(stack.blocks, x_TD), stack.step.calls
        stack.step.calls = []
        compiled = torch.compile(lambda x: run(stack.blocks, x), fullgraph=True, dynamic=False)
        found_TD, (code,) = run_and_get_code(compiled, x_TD)
    torch.testing.assert_close(found_TD, expected_TD)
    assert stack.step.calls == eager_calls
    assert eager_calls == [
        ("begin", 0, True), ("finish", 0, None), ("begin", 1, False), ("finish", 1, None),
        ("begin", 2, True), ("finish", 2, None),
    ]  # fmt: skip
    body = code[code.index("def call(") :]
    products = re.findall(r"extern_kernels\.mm\(.*out=(\w+)\)", body)
    assert re.findall(r"finish_path_\.default\((\w+),", body) == products
    assert len(products) == LAYERS
    assert "clone" not in body
    assert "copy_" not in body
    assert "cpp_fused" not in body


def test_layers_share_one_graph(stack: Any) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    for block in stack.blocks:
        torch._dynamo.reset()
        torch.compile(block, backend=backend, fullgraph=True)(torch.randn(TOKENS, D))
    bare = {re.sub(r"#.*", "", graph) for graph in graphs}
    assert len(graphs) == LAYERS
    assert len(bare) == 1
    assert "layers." not in bare.pop()


def test_schemas_say_what_changes(stack: Any) -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    x_TD, y_TD, scratch = torch.randn(TOKENS, D), torch.zeros(TOKENS, D), stack.step.scratch
    name = _encode_layer_name(stack.blocks[1].layer_name)
    scratch.copy_(x_TD)
    for operator, arguments in (
        (torch.ops.mtlora.begin_path.default, (x_TD, scratch, name)),
        (torch.ops.mtlora.finish_path_.default, (y_TD, x_TD, scratch, name)),
    ):
        changed = [argument.name for argument in operator._schema.arguments if argument.alias_info]
        assert changed == (["scratch"] if len(arguments) == 3 else ["y"])
        operator(*arguments)
    torch.testing.assert_close(y_TD, 2 * x_TD + 1)
