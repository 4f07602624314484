"""`make bench-gpu MODEL=1`: a decode step's time predicted from bytes, operations, launches and counted instructions.

None of its figures was measured on a card. It answers two questions: can a goal be reached at all, and what is the
limit? The parts of a launch's time:

    gap       from the end of the launch before it to its first instruction, in a graph
    chain     loads that wait for each other: header, tile and tokens from the L2 cache, the table's row and the first
              weights from memory
    work      the largest of: weights from memory; bytes through the L2 cache; products; instructions of all programs
    one item  instructions of one program, which are not hidden if every program has one item

On a side stream the shrink runs beside F, which is longer: only its memory time and the join remain. Piecewise is how
it ran before: the processor launches 65 pieces of graphs and an operator a layer, and the longer of processor and
device counts. Both: one stream with attention blocks wrapped too (`--adapter-blocks both`), beside which no adapter has
a path: two empty launches a layer. Code for sm_90 is that of the GPU lock's assembler, without pipelined products in
prefill.

Under tensor parallelism a rank has its share of the backbone's weights and the whole path; all-reduces are left out.
The KV cache is left out too; reading it makes the backbone slower, and every ratio larger.
"""

from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.gpu import work
from benchmarks.gpu.assembly import Assembly, assemble
from benchmarks.gpu.backbones import LLAMA_3_8B, QWEN_2_5_7B, SHAPE, Backbone
from benchmarks.gpu.work import Work
from mtlora.ops import tuning
from mtlora.ops.tuning import KernelConfig

SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LIVE = (1, 25)
PROMPT = 1024
PICTURE = Path("docs/gpu-model.png")
RANKS = (2, 4, 8)
# The assembler of the GPU lock's Triton.
PTXAS = "12.8"


@dataclass(frozen=True)
class Card:
    """A card's data sheet: bytes a second of memory, bfloat16 operations a second (dense), clock in Hz."""

    name: str
    capability: int
    num_sms: int
    memory: float
    operations: float
    clock: float
    l2: float


# NVIDIA's data sheets of A100 SXM 80 GB, H100 SXM and B200; bytes a second of L2 caches as read by microbenchmarks
# (Chips and Cheese), for B200 scaled by multiprocessors.
CARDS = (
    Card("A100", 80, 108, 2.04e12, 312e12, 1.41e9, 4.0e12),
    Card("H100", 90, 132, 3.35e12, 989e12, 1.75e9, 5.5e12),
    Card("B200", 100, 148, 8.0e12, 2250e12, 1.85e9, 6.2e12),
)


@dataclass(frozen=True)
class Assumptions:
    """Assumptions: seconds, and shares of a data sheet's figure. Each has its source beside it."""

    # A large copy on an H100 moves 3.0 of 3.35 TB/s, a large product 798 of 989 TFLOP/s (PyTorch 2.11, measured there).
    memory_share: float = 0.90
    operations_share: float = 0.80
    # Products of tiles of 16 or 64 tokens, by mma.sync or one WGMMA: a guess on the low side.
    small_operations_share: float = 0.20
    # Between dependent kernels of a graph; NVIDIA's "Getting Started with CUDA Graphs" finds 0.5 µs, here twice that.
    gap: float = 1.0e-6
    # 480 to 560 cycles unloaded (arXiv 2402.13499); twice that under load.
    memory_latency: float = 0.6e-6
    l2_latency: float = 0.2e-6
    # Cycles from an instruction of a warp to its next, and instructions a cycle of a multiprocessor with many warps:
    # dependent instructions take 4 to 6, half of this code's are independent; four schedulers, half used.
    cycles_per_instruction: float = 3.0
    instructions_per_cycle: float = 2.0
    # Kernels of a layer in vLLM: two norms, four products, rotary embedding, cache, attention in two, gate.
    kernels_per_layer: int = 11
    # Time of a small kernel.
    small_kernel: float = 1.0e-6
    # Processor time of a step of 32 layers before the graphs held the path, from reading vLLM 0.32 (5 to 6.5 ms).
    piecewise_per_layer: float = 5.75e-3 / 32
    # Gaps on the device between pieces of graphs if the processor is ahead: two pieces, attention, operator a layer.
    piecewise_gaps: float = 4 * 1.5e-6


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step. path: by the way that it runs; ratio: throughput with the path ÷ without."""

    backbone: float
    path: dict[str, float]

    def ratio(self, way: str) -> float:
        """The backbone's time ÷ that with the path."""
        return self.backbone / (self.backbone + self.path[way])


@cache
def _assembled(backbone: Backbone, card: Card, tokens: int) -> tuple[Assembly, Assembly]:
    # Import here: imported at the top, Triton would load as its interpreter.
    from mtlora.ops.triton_gpu import launches

    shrink, expand = launches(_config(backbone, card), tokens)
    return assemble(shrink, card.capability), assemble(expand, card.capability)


def _config(backbone: Backbone, card: Card) -> KernelConfig:
    return KernelConfig(
        hidden_size=backbone.hidden, dtype=torch.bfloat16, num_blocks=backbone.layers, max_adapters=256,
        max_tokens=8192, num_sms=card.num_sms, capability=card.capability,
        pipelined=tuning.may_pipeline(card.capability, PTXAS),
    )  # fmt: skip


def backbone_seconds(backbone: Backbone, card: Card, tokens: int, outputs: int, by: Assumptions, ranks: int) -> float:
    """A step of the backbone alone, split over `ranks`, whose output layer computes `outputs` rows."""
    memory, operations = card.memory * by.memory_share, card.operations * by.operations_share

    def product(weights: int, rows: int) -> float:
        return max(2 * weights / memory, 2 * weights * rows / operations) / ranks

    small = (by.kernels_per_layer - 4) * by.small_kernel
    layer = product(backbone.layer_weights, tokens) + small + by.kernels_per_layer * by.gap
    return backbone.layers * layer + product(backbone.vocabulary * backbone.hidden, outputs)


def launch_seconds(
    done: Work, code: Assembly, card: Card, config: KernelConfig, operations: int, by: Assumptions
) -> tuple[float, float]:  # fmt: skip
    """(all of a launch, the part of it that a side stream cannot hide). operations: multiplications and additions."""
    at_once = min(done.items, card.num_sms * min(code.programs, tuning.num_programs(config) // card.num_sms))
    rounds = -(-done.items // at_once)
    instructions = code.instructions + (done.products - 1) * code.in_product_loop
    one_item = instructions * by.cycles_per_instruction / card.clock
    per_sm = -(-done.items // card.num_sms)
    from_memory = done.memory / (card.memory * by.memory_share)
    busy = max(
        from_memory,
        done.cached / card.l2,
        operations / (card.operations * by.small_operations_share),
        per_sm * code.warps * instructions / (by.instructions_per_cycle * card.clock),
        rounds * one_item,
    )
    chain = 3 * by.l2_latency + 2 * by.memory_latency
    return by.gap + chain + one_item + max(0.0, busy - one_item), from_memory


def predict(
    backbone: Backbone, card: Card, tokens: int, live: int, *, decode: bool = True, by: Assumptions = ASSUMED,
    ranks: int = 1,
) -> Prediction:  # fmt: skip
    """A step of one of `ranks` with `live` adapters among its tokens, one beside every FFN block."""
    config, D = _config(backbone, card), backbone.hidden
    live = min(live, tokens)
    # A launch configuration depends only on the class of the step.
    codes = _assembled(backbone, card, next(size for size in (16, 512, config.max_tokens) if tokens <= size))
    shrink, expand = work.of_block(config, SHAPE, tokens, live)
    rows = work.step_plan(config, SHAPE, tokens, live).num_tiles * tuning.cut(config, tokens).block_t
    whole_shrink, bytes_of_shrink = launch_seconds(
        shrink, codes[0], card, config, 2 * rows * D * tuning.padded(SHAPE.columns), by
    )
    whole_expand, _ = launch_seconds(expand, codes[1], card, config, 2 * rows * D * SHAPE.experts * SHAPE.rank, by)
    alone = backbone_seconds(backbone, card, tokens, tokens if decode else 1, by, ranks)
    layers = backbone.layers
    one_stream = layers * (whole_shrink + whole_expand)
    of_f = 2 * 3 * D * backbone.intermediate
    beside = max(of_f / (card.memory * by.memory_share), of_f * tokens / (card.operations * by.operations_share))
    beside /= ranks
    if decode:
        hidden = bytes_of_shrink + max(0.0, whole_shrink - beside)
    else:  # products fill the card, so nothing is free
        hidden = max(bytes_of_shrink, whole_shrink - by.gap)
    side_stream = layers * (hidden + whole_expand)
    return Prediction(
        alone,
        {
            "piecewise": max(one_stream + layers * by.piecewise_gaps, layers * by.piecewise_per_layer - alone),
            "both": one_stream + 2 * layers * (by.gap + by.small_kernel),
            "one stream": one_stream,
            "side stream": side_stream,
        },
    )


def least_path_seconds(backbone: Backbone, card: Card, tokens: int, live: int) -> float:
    """A lower bound of the path's time: its weights are read from memory once."""
    moved = 2 * backbone.layers * min(tokens, live) * SHAPE.block_weights(backbone.hidden)
    return moved / (card.memory * ASSUMED.memory_share)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    backbone: str
    card: str
    tokens: int
    live: int
    found: Prediction
    bound: float


def rows() -> list[Row]:
    """Every prediction: decode steps, then a prompt's."""
    return [
        Row(
            backbone.name, card.name, tokens, live, found,
            found.backbone / (found.backbone + least_path_seconds(backbone, card, tokens, live)),
        )
        for backbone in (LLAMA_3_8B, QWEN_2_5_7B)
        for card in CARDS
        for tokens in (*SEQUENCES, PROMPT)
        for live in LIVE
        for found in [predict(backbone, card, tokens, live, decode=tokens != PROMPT)]
    ]  # fmt: skip


def table(some: list[Row]) -> str:
    """Predictions as Markdown. bound: the ratio if the path took only the time in which memory delivers its weights."""
    lines = [
        "| backbone | card | step | adapters | alone, ms | piecewise | both | one stream | side stream | bound |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in some:
        ways = " | ".join(f"{row.found.ratio(way):.3f}" for way in ("piecewise", "both", "one stream", "side stream"))
        step = f"prefill {PROMPT:,}" if row.tokens == PROMPT else f"decode {row.tokens}"
        lines.append(
            f"| {row.backbone} | {row.card} | {step} | {row.live} | {row.found.backbone * 1e3:.2f} | {ways} "
            f"| {row.bound:.3f} |"
        )
    return "\n".join(lines)


def picture(all_rows: list[Row], path: Path) -> None:
    """Ratio against sequences: a panel a backbone and card."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, len(CARDS), sharex=True, sharey=True)
    names = list(dict.fromkeys((row.backbone, row.card) for row in all_rows))
    for panel, (backbone, card) in zip(panels.flat, names, strict=True):
        for live, colour in zip(LIVE, ("tab:blue", "tab:orange"), strict=True):
            these = [
                r for r in all_rows if (r.backbone, r.card, r.live) == (backbone, card, live) and r.tokens != PROMPT
            ]
            tokens = [row.tokens for row in these]
            for way, style in (("side stream", "-"), ("one stream", "--"), ("piecewise", ":")):
                panel.plot(tokens, [r.found.ratio(way) for r in these], style, color=colour, label=f"{way}, {live}")
            panel.plot(tokens, [row.bound for row in these], ".", color=colour, label=f"bound, {live}")
        panel.set(title=f"{backbone}, {card}", xscale="log", ylim=(0.4, 1.01))
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    for panel in panels[1]:
        panel.set_xlabel("sequences in a decode step")
    for panel in panels[:, 0]:
        panel.set_ylabel("with the path ÷ without")
    panels[0, 0].legend(fontsize=7, ncols=2, title="way, adapters", title_fontsize=7, loc="lower left")
    figure.suptitle("Predicted by `make bench-gpu MODEL=1`; not run on a card")
    figure.savefig(path, dpi=110)


def sensitivity() -> str:
    """The bars' ratios if an assumption is half or twice what it is."""
    lines = [f"{'assumption':<24}{'half: 1, 25 adapters':>24}{'twice: 1, 25 adapters':>24}"]
    for name in ("gap", "memory_latency", "cycles_per_instruction", "instructions_per_cycle", "kernels_per_layer"):
        cells = ""
        for factor in (0.5, 2.0):
            by = replace(ASSUMED, **{name: factor * getattr(ASSUMED, name)})
            ratios = [predict(LLAMA_3_8B, CARDS[1], 64, live, by=by).ratio("side stream") for live in LIVE]
            cells += f"{'  '.join(f'{ratio:.3f}' for ratio in ratios):>24}"
        lines.append(f"{name:<24}{cells}")
    return "\n".join(lines)


def by_ranks() -> str:
    """The bars' ratios under tensor parallelism."""
    lines = [f"{'ranks':<8}{'one stream: 1, 25 adapters':>28}{'side stream: 1, 25 adapters':>28}"]
    for ranks in RANKS:
        found = [predict(LLAMA_3_8B, CARDS[1], 64, live, ranks=ranks) for live in LIVE]
        cells = ("  ".join(f"{of.ratio(way):.3f}" for of in found) for way in ("one stream", "side stream"))
        lines.append(f"{ranks:<8}{''.join(f'{cell:>28}' for cell in cells)}")
    return "\n".join(lines)


def report() -> None:
    """Print the assumptions, the table and what it says of the bars; draw the picture."""
    print(__doc__)
    for name, value in asdict(ASSUMED).items():
        print(f"  {name:<24}{value:g}")
    for card in CARDS:
        print(f"  {card}")
    all_rows = rows()
    print(f"\n{table(all_rows)}\n")
    for live, bar in ((1, 0.97), (25, 0.90)):
        found = next(
            r for r in all_rows if (r.backbone, r.card, r.tokens, r.live) == (LLAMA_3_8B.name, "H100", 64, live)
        )
        ratio = found.found.ratio("side stream")
        verdict = "reached" if ratio >= bar else "missed"
        print(f"{LLAMA_3_8B.name}, H100, 64 sequences, {live} adapters: {ratio:.4f}; bar {bar:.2f}: {verdict}")
    print(f"\n{sensitivity()}\n\n{by_ranks()}\n")
    read = 2 * LLAMA_3_8B.layers * 25 * SHAPE.block_weights(LLAMA_3_8B.hidden) / 1e9
    beside = 2 * (LLAMA_3_8B.layers * LLAMA_3_8B.layer_weights + LLAMA_3_8B.vocabulary * LLAMA_3_8B.hidden) / 1e9
    print(f"25 adapters beside FFN blocks read {read:.2f} GB a step, the backbone {beside:.1f} GB: no kernel avoids it")
    picture(all_rows, PICTURE)
    print(f"wrote {PICTURE}")
