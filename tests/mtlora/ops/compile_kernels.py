"""Compiles the Triton kernels for cards that this machine lacks. Run as a separate program, without the interpreter."""

import itertools
import re

import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtlora.ops.triton_gpu import Launch, launches
from mtlora.ops.tuning import KernelConfig

# No argument is of a multiple of 16 by chance: sizes and addresses are, these two are not.
_ANY = ("block", "num_tokens")


def compiled(launch: Launch, capability: int) -> "triton_compile":
    """A launch's kernel, compiled as a real launch compiles it."""
    kernel, names = launch.kernel, launch.kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: launch.arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in launch.arguments and n not in _ANY},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.max_registers}
    return triton_compile(source, target=GPUTarget("cuda", capability, 32), options=options)


if __name__ == "__main__":
    for capability, tokens in itertools.product((80, 90, 100), (16, 64, 1024)):
        config = KernelConfig(4096, torch.bfloat16, 32, 64, 8192, capability=capability)
        for launch in launches(config, tokens):
            ptx = compiled(launch, capability).asm["ptx"]
            narrow = re.findall(r"ld\.global\S*\.b16", ptx)
            name = f"{launch.kernel.__name__} for sm_{capability}, {tokens} tokens"
            assert not narrow, f"{name}: {len(narrow)} loads of single numbers"
            assert "mma" in ptx, f"{name}: no tensor cores"
            print(f"{name}: compiled")
