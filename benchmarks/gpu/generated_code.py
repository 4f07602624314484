"""Compiles every class of launches for sm_80, sm_90 and sm_100 and checks bounds; needs no card.

    no spills no thread uses local memory programs enough fit on a multiprocessor at once to hide the latency of a
    program's loads (`PROGRAMS`) products 16-bit products are on tensor cores WGMMA no product with A in registers is
    still running at the end of a pass, unless the assembler is 13.3 or newer loads a thread loads weights and x in
    units of 16 bytes stores stores of y are no wider than the alignment of every adapter's groups stages the shrink has
    a pass's loads in flight while it waits for older ones; the expand loads one pass
                        ahead, but for tiles of 64 tokens where products are not pipelined
    bytes               a pass of a product's loop loads the tiles it multiplies, and nothing twice

How many bytes all passes load is counted by `tests/benchmarks/traffic.py`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.assembly import (
    Assembly,
    assemble,
    assembler_version,
    loaded_bytes,
    overlaps_register_products,
    stages,
    widest_store,
)
from mtlora.ops import tuning
from mtlora.ops.triton_gpu import Launch, launches
from mtlora.ops.tuning import KernelConfig

CAPABILITIES = (80, 90, 100)
# Hidden sizes, by the largest power of two that divides a group's columns: 2 (576), 4 (896), 8 (2304) and 16.
HIDDEN = (576, 896, 2304, 3584, 4096, 8192)
DTYPES = (torch.bfloat16, torch.float16)
# The largest rank, experts and groups of an adapter: the server's defaults, and the largest that tests run.
LARGEST = ((64, 32, 32), (128, 64, 32))
# One number of tokens for each class of steps.
TOKENS = (16, 512, 8192)
# Fewest programs of (shrink, expand) that must fit on a multiprocessor, by size of step. A grid has four for each;
# those that do not fit run later.
PROGRAMS = {16: (4, 3), 512: (4, 3), 8192: (3, 1)}
# The same for the expand in decode steps, where it accesses y by few numbers at a time.
NARROW_PROGRAMS = 2
# Fewest stages of the shrink's and the expand's loads.
STAGES = (3, 2)


@dataclass(frozen=True)
class Class:
    """A config and a number of tokens, which together determine both launches."""

    config: KernelConfig
    tokens: int

    def __str__(self) -> str:
        """Its name in reports."""
        of = self.config
        stages = "" if of.pipelined else ", one stage"
        of_step = f"{of.dtype}, {self.tokens} tokens, rank to {of.max_rank}{stages}"
        return f"sm_{of.capability}, hidden {of.hidden_size}, {of_step}"


def classes(
    capabilities: tuple[int, ...] = CAPABILITIES, hidden: tuple[int, ...] = HIDDEN,
    dtypes: tuple[torch.dtype, ...] = DTYPES, tokens: tuple[int, ...] = TOKENS,
    largest: tuple[tuple[int, int, int], ...] = LARGEST,
) -> Iterator[Class]:  # fmt: skip
    """Every class; for sm_90 also as an unsound assembler would have it."""
    for capability, size, dtype, step, (rank, experts, groups) in itertools.product(
        capabilities, hidden, dtypes, tokens, largest
    ):
        config = KernelConfig(
            hidden_size=size, dtype=dtype, num_blocks=32, max_adapters=256, max_tokens=8192, max_rank=rank,
            max_experts=experts, max_groups=groups, capability=capability,
            pipelined=tuning.may_pipeline(capability, _version(capability)),
        )  # fmt: skip
        yield Class(config, step)
        if capability == 90 and config.pipelined and tuning.tile_size(step) > 16:
            yield Class(replace(config, pipelined=tuning.may_pipeline(capability, "12.8")), step)


def faults(one: Class, mutate: Callable[[Launch], Launch] = lambda launch: launch) -> tuple[list[str], list[Assembly]]:
    """(faults of a class, its two kernels). mutate: first changes a launch, for tests of the checks."""
    config, way = one.config, tuning.cut(one.config, one.tokens)
    size = config.dtype.itemsize
    bytes_of_pass = (way.block_t + way.block_s) * way.block_d * size, way.block_n * 16 * way.block_e * size
    sound = config.capability != 90 or (config.pipelined and tuning.may_pipeline(90, _version(90)))
    of_stages = STAGES if config.pipelined or tuning.tile_size(one.tokens) == 16 else (STAGES[0], 1)
    found, codes = [], []
    of_shrink, of_expand = PROGRAMS[one.tokens]
    if config.alignment < tuning.ALIGNMENT:
        of_expand = min(of_expand, NARROW_PROGRAMS)
    for launch, needed, programs, loads in zip(
        launches(config, one.tokens), bytes_of_pass, (of_shrink, of_expand), of_stages, strict=True
    ):
        code, name = assemble(mutate(launch), config.capability), launch.kernel.__name__
        codes.append(code)
        if code.stack:
            found.append(f"{name} spills: {code.stack} bytes a thread")
        if code.programs < programs:
            found.append(
                f"{name}: {code.programs} programs fit on a multiprocessor, {programs} are needed "
                f"({code.registers} registers, {code.shared} bytes)"
            )
        if "mma" not in code.ptx:
            found.append(f"{name}: no tensor cores")
        if overlaps_register_products(code.ptx) and not sound:
            found.append(f"{name}: WGMMA with A in registers is left running")
        # Those of sampled routing are of 4 bytes.
        if name == "_expand" and (stored := widest_store(code.ptx)) > max(4, config.alignment * size):
            found.append(f"{name}: stores of {stored} bytes, y is aligned to {config.alignment * size}")
        if (seen := max(stages(loop) for loop in code.loops)) < loads:
            found.append(f"{name}: loads in {seen} stages, {loads} are needed")
        wide = {loaded_bytes(loop, code.warps, width=16) for loop in code.loops}
        if max(wide) != needed:
            found.append(
                f"{name}: loops load {sorted(wide)} bytes by 16 a thread, the tiles of a product have {needed}"
            )
    return found, codes


def _version(capability: int) -> str:
    return ".".join(map(str, assembler_version(capability)))


def report() -> bool:
    """Print every class with its faults; returns whether there are none."""
    right = count = 0
    # The largest sizes are strides of the code and no more: the defaults' are seen for one hidden size.
    for one in (*classes(largest=LARGEST[1:]), *classes(hidden=(4096,), dtypes=DTYPES[:1], largest=LARGEST[:1])):
        found, (shrink, expand) = faults(one)
        count += 1
        right += not found
        figures = ", ".join(
            f"{name} {code.registers} registers, {code.shared} B, {code.programs} programs, "
            f"{code.instructions} instructions"
            for name, code in (("shrink", shrink), ("expand", expand))
        )
        print(f"{one}: {figures}{''.join(f'{chr(10)}  WRONG: {fault}' for fault in found)}", flush=True)
    print(f"bench-gpu: generated code {right} of {count}")
    return right == count
