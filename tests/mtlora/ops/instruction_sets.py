"""The kernels' instruction sets as cases of tests; those that this processor lacks are skipped."""

import pytest

from mtlora.ops.cpu_kernel import INSTRUCTION_SETS, compiled_kernel

KERNEL = compiled_kernel()


def lacks(name: str) -> pytest.MarkDecorator:
    """Skips a case of an instruction set that this processor lacks."""
    there = KERNEL is not None and bool(KERNEL.mtlora_supported(INSTRUCTION_SETS[name]))
    return pytest.mark.skipif(not there, reason=f"this processor has no {name}, or the kernel is not built")


every_set = pytest.mark.parametrize(
    "isa", [pytest.param(number, id=name, marks=lacks(name)) for name, number in INSTRUCTION_SETS.items()]
)
