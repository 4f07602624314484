"""Norms and gates of an eager backbone on a CPU, in one call each.

On CPUs, vLLM relies on its compiler to fuse them. Eagerly, RMSNorm takes nine calls and passes over memory, and the
gate of a feed-forward block two. vLLM's CPU build has kernels for them, but does not call them on x86: those for
bfloat16 cut off the bits that they should round on processors without bfloat16, and the gate's is slower than two
calls.
"""

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

from mtlora.ops import cpu_elementwise

# The norms' implementations under this name are among those that vLLM chooses from (vllm/ir/op.py).
PROVIDER = "mtlora_eager_cpu"
_NORMS = ("rms_norm", "fused_add_rms_norm")


class OneCallSiluAndMul(SiluAndMul):
    """vLLM's layer, in one call if it runs eagerly on a CPU, unchanged if it is compiled."""

    def forward_cpu(self, x: Tensor) -> Tensor:
        """silu(x[..., :d]) * x[..., d:] for x [..., 2d]."""
        if x.is_contiguous() and cpu_elementwise.runs(x):
            return cpu_elementwise.silu_and_mul(x)
        return self.forward_native(x)


def use_single_calls() -> None:
    """Make engines that start later in this process use them."""
    CustomOp.register_oot(OneCallSiluAndMul, name=SiluAndMul.__name__)
    platform: Any = type(current_platform)
    stock_import, stock_priority = platform.import_ir_kernels, platform.get_default_ir_op_priority

    def import_ir_kernels(cls: Any) -> None:
        stock_import()
        _register_norms()

    def get_default_ir_op_priority(cls: Any, vllm_config: VllmConfig) -> Any:
        priority = stock_priority(vllm_config)
        if vllm_config.model_config is not None and vllm_config.model_config.enforce_eager:
            for name in _NORMS:
                setattr(priority, name, [PROVIDER, *getattr(priority, name)])
        return priority

    platform.import_ir_kernels = classmethod(import_ir_kernels)
    platform.get_default_ir_op_priority = classmethod(get_default_ir_op_priority)


def _register_norms() -> None:
    from vllm import ir

    if PROVIDER in ir.ops.rms_norm.impls:
        return

    @ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_norm_takes)
    def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        assert weight is not None
        return cpu_elementwise.norm(x, weight, epsilon)

    @ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_sum_norm_takes, inplace=True)
    def fused_add_rms_norm(
        x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        assert weight is not None
        return cpu_elementwise.add_rms_norm_(x, x_residual, weight, epsilon)


def _norm_takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and x.is_contiguous() and cpu_elementwise.runs(x, weight)


def _sum_norm_takes(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        variance_size is None
        and weight is not None
        and x.is_contiguous()
        and x_residual.is_contiguous()
        and cpu_elementwise.runs(x, x_residual, weight)
    )
