"""Norms and gates that an eager engine on a CPU runs in one call each: their results, and that the engine uses them."""

import pytest
import torch

from mtlora import vllm_plugin
from mtlora.ops import cpu_kernel
from tests.engine._engine import running_engine, worker_of
from tests.engine._models import make_model

pytestmark = pytest.mark.skipif(cpu_kernel.compiled_kernel() is None, reason="the kernel is not built here")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(scope="module")
def norms():
    """The implementations of both norms."""
    vllm_plugin.register()
    from vllm import ir
    from vllm.platforms import current_platform

    from mtlora.vllm_cpu.eager_cpu import PROVIDER

    current_platform.import_ir_kernels()
    return ir.ops.rms_norm.impls[PROVIDER], ir.ops.fused_add_rms_norm.impls[PROVIDER]


@every_dtype
def test_norms_equal_vllms(norms, dtype):
    from vllm import ir

    x, residual = torch.randn(2, 5, 96).to(dtype).unbind()
    weight = torch.randn(96).to(dtype)
    # One rounding of the result: sums in another order differ in their last bits before it.
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    alone, added = norms
    expected = ir.ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-5)
    torch.testing.assert_close(alone.impl_fn(x, weight, 1e-5), expected, rtol=unit, atol=unit)
    expected, total = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-5)
    found, kept = added.impl_fn(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(found, expected, rtol=unit, atol=unit)
    assert torch.equal(kept, total)


def test_norms_leave_unsupported_arguments_to_torch(norms):
    alone, added = norms
    x, weight = torch.randn(4, 64), torch.ones(64)
    assert alone.supports_args(x, weight, 1e-5)
    assert added.supports_args(x, x, weight, 1e-5)
    wide = torch.randn(4, 128)[:, :64]
    assert not alone.supports_args(wide, weight, 1e-5)
    assert not added.supports_args(x, wide, weight, 1e-5)
    assert not alone.supports_args(x, weight.bfloat16(), 1e-5)
    assert not alone.supports_args(x, None, 1e-5)
    assert not alone.supports_args(x, weight, 1e-5, 32)


def test_eager_engine_runs_the_single_calls(tmp_path, monkeypatch):
    from vllm import SamplingParams, ir

    from mtlora.ops import cpu_elementwise
    from mtlora.vllm_cpu.eager_cpu import PROVIDER, OneCallSiluAndMul

    gates = []
    one_call = cpu_elementwise.silu_and_mul
    monkeypatch.setattr(cpu_elementwise, "silu_and_mul", lambda x: gates.append(len(x)) or one_call(x))
    with running_engine(make_model(tmp_path / "model", "llama"), dtype="float32") as engine:
        assert ir.ops.rms_norm.get_priority()[0] == PROVIDER
        assert ir.ops.fused_add_rms_norm.get_priority()[0] == PROVIDER
        model = worker_of(engine).model
        layers = sum(isinstance(module, OneCallSiluAndMul) for module in model.modules())
        gates.clear()
        engine.generate([{"prompt_token_ids": [5] * 7}], SamplingParams(max_tokens=1), use_tqdm=False)
    assert layers
    assert gates == [7] * layers


def test_compiled_engine_leaves_the_norms_to_its_compiler(tmp_path):
    vllm_plugin.register()
    from vllm.engine.arg_utils import EngineArgs

    from mtlora.vllm_cpu.eager_cpu import PROVIDER

    folder = str(make_model(tmp_path / "model", "llama"))
    for eager in (True, False):
        arguments = EngineArgs(model=folder, skip_tokenizer_init=True, enforce_eager=eager)
        priority = arguments.create_engine_config().kernel_config.ir_op_priority
        assert (PROVIDER in priority.rms_norm) == eager
        assert (PROVIDER in priority.fused_add_rms_norm) == eager
