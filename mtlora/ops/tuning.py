"""How the Triton kernels divide their work. It depends only on the engine's config and a step's padded tokens.

So every mix of adapters uses launches that were compiled and captured before. Values that differ between mixes are in
the plan's header on the device: the live tiles, and the parts of a sum.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

# Rows of packed weights are padded to a multiple of this, so that every row is aligned for wide loads.
ALIGNMENT = 16

# Programs per multiprocessor in a launch.
_PROGRAMS_PER_SM = 4

# Steps with more tokens than this use tiles of 64.
_DECODE_TOKENS = 512
# Step sizes that have an own way to cut: a step uses that of the largest size up to its own.
SHAPES = (1, 17, _DECODE_TOKENS + 1)
# Minimum rows of scratch space; parts times planned tokens never exceed its rows.
_SCRATCH_ROWS = 16 * _DECODE_TOKENS

# Columns of y per piece. The plan's header has the number of pieces for each size.
PIECES = (32, 64, 128)
# Numbers of pieces that a program may compute in sequence with one softmax; the plan's header chooses one.
RUNS = (1, 2, 4, 8, 16)

# The first ptxas that correctly assembles pipelined WGMMA with its left operand in registers.
_SOUND_PTXAS = (13, 3)


@dataclass(frozen=True)
class KernelConfig:
    """Sizes that launches depend on besides a step's padded tokens; fixed when the engine starts.

    num_blocks, max_adapters: blocks and rows of the table. max_rank, max_experts, max_groups: the largest adapter.
    max_tokens: the largest step. max_parts: the most parts that a decode step splits x's dimensions into. capability:
    90 means sm_90. pipelined: whether products of 64 tokens may be pipelined.
    """

    hidden_size: int
    dtype: torch.dtype
    num_blocks: int
    max_adapters: int
    max_tokens: int
    max_rank: int = 64
    max_experts: int = 32
    max_groups: int = 32
    max_parts: int = 8
    num_sms: int = 132
    capability: int = 90
    pipelined: bool = True

    @property
    def columns(self) -> int:
        """Columns of the scratch space: the padded columns of the largest adapter's [A; R]."""
        return padded(self.max_rank + self.max_groups * self.max_experts)

    @property
    def scratch_rows(self) -> int:
        """Rows of the scratch space."""
        return max(self.max_tokens, _SCRATCH_ROWS)

    @property
    def alignment(self) -> int:
        """A power of two up to 16 that divides the width of every adapter's groups."""
        widths = (self.hidden_size // g for g in range(1, self.max_groups + 1) if self.hidden_size % g == 0)
        return math.gcd(ALIGNMENT, *widths)

    def check(self, rank: int, experts: int, groups: int) -> None:
        """Raise ValueError for an adapter that exceeds the configured sizes."""
        for name, found, largest in (
            ("rank", rank, self.max_rank),
            ("experts", experts, self.max_experts),
            ("groups", groups, self.max_groups),
        ):
            if found > largest:
                raise ValueError(f"found {name} {found}; this engine was started with max_{name} {largest}")


@dataclass(frozen=True)
class Cut:
    """How a launch's work is divided. max_parts: the most parts that x's dimensions are split into.

    block_*: a program's share of tokens T, dimensions D, columns S of [A; R], experts N and columns of y E; it takes 16
    of the rank at a time. expand_registers: the most registers of a thread; without it ptxas uses fewer and spills.
    """

    block_t: int
    max_parts: int
    block_e: int
    block_d: int = 128
    block_s: int = 64
    block_n: int = 4
    shrink_warps: int = 4
    shrink_stages: int = 3
    expand_warps: int = 4
    expand_stages: int = 2
    expand_registers: int | None = None


def padded(columns: int) -> int:
    """The length in memory of a row of packed weights."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def tile_size(num_tokens: int) -> int:
    """Tokens of a tile on a GPU: 16 in decode steps (the minimum of a matrix product), 64 in prefill."""
    return 16 if num_tokens <= _DECODE_TOKENS else 64


def cut(config: KernelConfig, padded_tokens: int) -> Cut:
    """How the kernels cut a step of so many tokens, padding included."""
    if tile_size(padded_tokens) == 16:
        block_e = 32 if padded_tokens < SHAPES[1] else 64
        # Narrow accesses to y need more address registers.
        registers = 168 if config.alignment == ALIGNMENT else 216
        return Cut(block_t=16, max_parts=config.max_parts, block_e=block_e, block_n=8, expand_registers=registers)
    few, stages = min(4, config.max_parts), 2 if config.pipelined else 1
    return Cut(block_t=64, max_parts=few, block_e=128, block_d=64, expand_warps=8, expand_stages=stages)


def num_programs(config: KernelConfig) -> int:
    """Number of programs in a launch; they loop over the live work."""
    return config.num_sms * _PROGRAMS_PER_SM


def parts(config: KernelConfig, tiles: int, columns: int, tokens: int) -> int:
    """Number of parts of x's dimensions: enough to use the whole GPU, and few enough for the scratch space."""
    wanted = config.num_sms // max(1, tiles * -(-columns // Cut.block_s))
    room = min(config.scratch_rows // max(1, tokens), config.hidden_size // Cut.block_d)
    return max(1, min(config.max_parts, wanted, room))


def on_this_card(device: torch.device, **sizes: Any) -> KernelConfig:
    """The config for a device; `sizes` holds the fields that do not follow from the device."""
    # Imported here: CPU installations may have no Triton.
    from triton.backends.nvidia.compiler import get_ptxas

    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    return KernelConfig(
        num_sms=properties.multi_processor_count,
        capability=capability,
        pipelined=may_pipeline(capability, get_ptxas(capability).version),
        **sizes,
    )


def may_pipeline(capability: int, ptxas: str) -> bool:
    """Whether products of 64 tokens may be pipelined: on sm_90 only if ptxas is new enough."""
    return capability // 10 != 9 or tuple(map(int, ptxas.split("."))) >= _SOUND_PTXAS
