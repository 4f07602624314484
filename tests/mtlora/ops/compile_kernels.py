"""Compiles the Triton kernels for cards that this machine lacks. Run as a separate program, without the interpreter."""

import re

import triton.language as tl
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtlora.ops import triton_gpu

_TYPES = {
    "x": "*bf16", "y": "*bf16", "s": "*fp32", "rows": "*i64", "tokens": "*i32", "bias_rows": "*i32", "tiles": "*i32",
}  # fmt: skip
_COMMON = {"PARTS": 4, "ALIGNED": 16, "PRECISION": "tf32", "OPERAND": tl.bfloat16}
_KERNELS = (
    (triton_gpu._shrink, {"BLOCK_S": 64, "BLOCK_D": 128}),
    (triton_gpu._expand, {"BLOCK_R": 16, "BLOCK_N": 16, "BLOCK_I": 4, "BLOCK_E": 128}),
)

for capability in (80, 90):
    for block_t in (16, 64):
        for kernel, own in _KERNELS:
            constants = {**_COMMON, **own, "BLOCK_T": block_t}
            names = kernel.arg_names
            source = ASTSource(
                fn=kernel,
                signature={n: "constexpr" if n in constants else _TYPES.get(n, "i32") for n in names},
                constexprs={(names.index(n),): value for n, value in constants.items()},
                # As in a real launch: torch aligns tensors, and sizes are multiples of 16.
                attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
            )
            ptx = triton_compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
            narrow = re.findall(r"ld\.global\S*\.b16", ptx)
            assert not narrow, f"{kernel.__name__}, sm_{capability}: {len(narrow)} loads of single numbers"
            assert "mma" in ptx, f"{kernel.__name__}, sm_{capability}: no tensor cores"
            print(f"{kernel.__name__} for sm_{capability}, {block_t} tokens: compiled")
