"""Assembles a Triton kernel for a card and reads registers, shared memory, spills, products and loads of the code.

Compiling needs no card: Triton brings NVIDIA's assembler and disassembler.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Arguments that kernels are not specialised for.
_OF_ANY_VALUE = ("block", "num_tokens")
# An access in PTX and how many bytes each thread moves by it.
_ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
_WAIT = re.compile(r"cp\.async\.wait_group\s+(0x[0-9a-f]+|\d+)")
_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s")
_STORE = re.compile(r"\bst\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s")
_LABEL = re.compile(r"^\s*(\$\S+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$[^;\s]+)")


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share on a streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    # Shared memory of each program that CUDA reserves.
    reserved_bytes: int = 1024


MULTIPROCESSORS = {
    80: Multiprocessor(shared_bytes=164 * 1024),
    90: Multiprocessor(shared_bytes=228 * 1024),
    100: Multiprocessor(shared_bytes=228 * 1024),
}


@dataclass(frozen=True)
class Assembly:
    """A kernel assembled for one card. registers: of a thread; shared: bytes of a program; stack: bytes of a thread.

    instructions: of the machine code, each loop once, without loops behind the products' (they sample the routing, in
    few steps); in_product_loop: those of the innermost loop with products.
    """

    capability: int
    warps: int
    registers: int
    shared: int
    stack: int
    instructions: int
    in_product_loop: int
    ptx: str

    @property
    def programs(self) -> int:
        """Programs that fit on a multiprocessor at once."""
        of = MULTIPROCESSORS[self.capability]
        # Registers are given out by 256 to a warp.
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            of.registers // (per_warp * self.warps),
            of.shared_bytes // (self.shared + of.reserved_bytes),
            of.warps // self.warps,
        )

    @property
    def loops(self) -> list[str]:
        """The innermost loops, as PTX."""
        lines = self.ptx.splitlines()
        at = {match[1]: i for i, line in enumerate(lines) if (match := _LABEL.match(line))}
        spans = [
            (at[match[1]], i)
            for i, line in enumerate(lines)
            if (match := _BRANCH.search(line)) and at.get(match[1], i) < i
        ]
        inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        return ["\n".join(lines[first : last + 1]) for first, last in inner]


def assemble(launch: Any, capability: int) -> Assembly:
    """Compile a `triton_gpu.Launch` for a card, as a real launch compiles it."""
    names = launch.kernel.arg_names
    # All other arguments are multiples of 16: addresses and strides.
    divisible = [i for i, name in enumerate(names) if name in launch.arguments and name not in _OF_ANY_VALUE]
    source = ASTSource(
        fn=launch.kernel,
        signature={name: launch.arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([_TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    stack = used["STACK"] + used["LOCAL"]
    return Assembly(
        capability, launch.num_warps, used["REG"], compiled.metadata.shared, stack, *_counted(code), compiled.asm["ptx"]
    )


def _counted(code: str) -> tuple[int, int]:
    """(instructions, those of the smallest loop with products) of disassembled machine code."""
    instructions: list[str] = []
    at: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            at[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
    spans = [
        (at[to[1]], i + 1)
        for i, instruction in enumerate(instructions)
        if (to := re.search(r"BRA\b.*`\((\.L_x_\d+)\)", instruction)) and at[to[1]] < i
    ]
    products = [i for i, instruction in enumerate(instructions) if "MMA" in instruction]
    inner = min((end - first for first, end in spans if any(first <= i < end for i in products)), default=0)
    seldom = sum(end - first for first, end in spans if products and first > products[-1])
    return sum(i != "NOP" for i in instructions) - seldom, inner


def assembler_version(capability: int) -> tuple[int, int]:
    """(major, minor) of the assembler that this Triton uses for a card."""
    from triton.backends.nvidia import compiler

    found = re.search(r"release (\d+)\.(\d+)", compiler.get_ptxas_version(capability))
    assert found
    return int(found[1]), int(found[2])


def overlaps_register_products(ptx: str) -> bool:
    """Whether WGMMA products with A in registers are still running when the loop continues.

    Assemblers before 13.3 may then reload A's registers too early (triton-lang/triton#9433, #11781).
    """
    from_registers = re.search(r"wgmma\.mma_async[^;]*?\{[^}]*\},\s*\{[^}]*\}", ptx)
    waits = [int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)]
    return bool(from_registers) and any(waits)


def stages(ptx: str) -> int:
    """Stages of a loop's loads: 1 if it waits for each, 2 if a pass loads the next one's, 3 if more stay in flight."""
    if not _ASYNC_COPY.search(ptx):
        return 1
    return 3 if any(int(number, 0) for number in _WAIT.findall(ptx)) else 2


def widest_store(ptx: str) -> int:
    """Most bytes that a thread stores to global memory at once."""
    return max(int(count or 1) * int(bits) // 8 for count, bits in _STORE.findall(ptx))


def loaded_bytes(ptx: str, warps: int, width: int) -> int:
    """Bytes that a program loads from global memory by `width` a thread, in a pass over `ptx` with every mask true."""
    copied = [int(size, 0) for size in _ASYNC_COPY.findall(ptx)]
    loaded = [int(count or 1) * int(bits) // 8 for count, bits in _LOAD.findall(ptx)]
    return 32 * warps * sum(size for size in copied + loaded if size == width)
