"""What a Triton kernel becomes for a card, read off its machine code: registers, shared memory, spills, products, loads.

Compiling needs no card: Triton brings NVIDIA's assembler and disassembler.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# An access in PTX and how many bytes each thread moves by it.
_ASYNC_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")
_LOAD = re.compile(r"\bld\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s")
_LABEL = re.compile(r"^\s*(\$\S+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$[^;\s]+)")


@dataclass(frozen=True)
class Multiprocessor:
    """What programs share on a streaming multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    shared_bytes: int
    registers: int = 65536
    warps: int = 64
    # CUDA keeps this much shared memory for itself in each program.
    reserved_bytes: int = 1024


MULTIPROCESSORS = {
    80: Multiprocessor(shared_bytes=164 * 1024),
    90: Multiprocessor(shared_bytes=228 * 1024),
    100: Multiprocessor(shared_bytes=228 * 1024),
}


@dataclass(frozen=True)
class Assembly:
    """A kernel assembled for one card. registers: of a thread; shared: bytes of a program; stack: bytes of a thread."""

    capability: int
    warps: int
    registers: int
    shared: int
    stack: int
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


def assemble(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, *, warps: int, stages: int,
    divisible: Mapping[str, int],
) -> Assembly:  # fmt: skip
    """Compile `kernel` for a card. types: of its arguments that are no constants; divisible: what divides them."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", divisible[name]]] for i, name in enumerate(names) if name in divisible},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Assembly(
        capability, warps, used["REG"], compiled.metadata.shared, used["STACK"] + used["LOCAL"], compiled.asm["ptx"]
    )


def assembler_version(capability: int) -> tuple[int, int]:
    """(major, minor) of the assembler that this Triton uses for a card."""
    from triton.backends.nvidia import compiler

    found = re.search(r"release (\d+)\.(\d+)", compiler.get_ptxas_version(capability))
    assert found
    return int(found[1]), int(found[2])


def overlaps_register_products(ptx: str) -> bool:
    """Whether WGMMA products that take A from registers are left running while the loop goes on.

    Assemblers before 13.3 may then load A's registers anew too early (triton-lang/triton#9433, #11781).
    """
    from_registers = re.search(r"wgmma\.mma_async[^;]*?\{[^}]*\},\s*\{[^}]*\}", ptx)
    waits = [int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", ptx)]
    return bool(from_registers) and any(waits)


def loaded_bytes(ptx: str, warps: int) -> int:
    """Bytes that a program's threads load from global memory in one pass over `ptx`, if every mask is true."""
    copied = sum(int(size, 0) for size in _ASYNC_COPY.findall(ptx))
    loaded = sum(int(count or 1) * int(bits) // 8 for count, bits in _LOAD.findall(ptx))
    return 32 * warps * (copied + loaded)


def load_widths(ptx: str) -> set[int]:
    """Bytes of a thread's single loads from global memory."""
    copied = {int(size, 0) for size in _ASYNC_COPY.findall(ptx)}
    return copied | {int(count or 1) * int(bits) // 8 for count, bits in _LOAD.findall(ptx)}
