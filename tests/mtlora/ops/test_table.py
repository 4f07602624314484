"""What tables, plans and the operator refuse, before any kernel runs; and what placing an adapter does."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu.cases import SHAPE_CLASSES, Batch
from mtlora.ops import cpu, tuning
from mtlora.ops.mix import Mix
from mtlora.ops.packed_block import PackedBlock
from mtlora.ops.plan import DevicePlan, Header, counts_of, plan_step
from mtlora.ops.table import AdapterRows, AdapterTable, Field, Layout
from mtlora.ops.tuning import KernelConfig

CPU = torch.device("cpu")


def block(D: int = 12, r: int = 2, N: int = 3, G: int = 2, dtype: torch.dtype = torch.float32) -> PackedBlock:
    return PackedBlock(torch.zeros(D, r + G * N, dtype=dtype), torch.zeros(G, N * r, D // G, dtype=dtype), r)


def table(**changes: object) -> AdapterTable:
    arguments = {"hidden_size": 12, "dtype": torch.float32, "device": CPU} | changes
    return AdapterTable(1, 2, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shrink_DS": torch.zeros(12, 8, dtype=torch.bfloat16)}, "must share one of"),
        ({"shrink_DS": torch.zeros(12, 8, dtype=torch.int32)}, "must share one of"),
        ({"shrink_DS": torch.zeros(8, 12).t()}, "shrink must be contiguous"),
        ({"expand_GKE": torch.zeros(2, 6, 12)[:, :, ::2]}, "expand must be contiguous"),
        ({"expand_GKE": torch.zeros(5, 6, 2)}, "num_groups 5 does not divide the hidden size 12"),
        ({"shrink_DS": torch.zeros(12, 9)}, "shrink has 9 columns"),
        ({"rank": 4}, "rank 4 does not divide"),
        ({"bias_bGN": torch.zeros(1, 2, 3, dtype=torch.float64)}, "bias must be float32"),
        ({"bias_bGN": torch.zeros(1, 3, 2)}, "bias must be float32"),
        ({"expand_GKE": torch.zeros(2, 6, 6, device="meta")}, "expand is on meta"),
    ],
)
def test_refuses_weights_that_kernels_cannot_read(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterRows([block()._replace(**changes)])


def test_refuses_adapters_that_do_not_fit_the_table() -> None:
    for row in (-1, 2):
        with pytest.raises(IndexError):
            table().place(row, AdapterRows([block()]))
    for changes in ({"dtype": torch.bfloat16}, {"hidden_size": 24}):
        with pytest.raises(ValueError, match="in a table of"):
            table(**changes).place(0, AdapterRows([block()]))
    with pytest.raises(ValueError, match="2 blocks"):
        table().place(0, AdapterRows([block(), block()]))
    with pytest.raises(ValueError, match="several kinds"):
        AdapterRows([block(), block(dtype=torch.bfloat16)])
    sizes = {"num_blocks": 1, "max_adapters": 2, "max_tokens": 8}
    on_gpu = table(config=KernelConfig(12, torch.float32, **sizes, max_rank=2, max_experts=3, max_groups=2))
    on_gpu.place(0, AdapterRows([block()], layout=Layout.PADDED))
    for larger, message in ((block(r=4), "found rank 4; this engine .* max_rank 2"), (block(N=4), "found experts 4"),
                            (block(G=3), "found groups 3")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            on_gpu.place(1, AdapterRows([larger], layout=Layout.PADDED))


def test_placing_is_in_place_and_can_be_undone() -> None:
    batch = Batch(SHAPE_CLASSES["many-tokens-of-many"], torch.float32)
    address, held = batch.table.rows_LAF.data_ptr(), batch.table.held(0)
    batch.table.place(0, None)
    batch.table.place(0, held)
    assert batch.table.rows_LAF.data_ptr() == address
    cpu.add_mixed_paths_(batch.mix)
    batch.check()
    for row in range(batch.table.num_rows):
        batch.table.place(row, None)
    before = batch.y_TD.clone()
    cpu.add_mixed_paths_(batch.mix)
    assert torch.equal(batch.y_TD, before)


def test_a_block_without_a_path_adds_nothing() -> None:
    rows = AdapterRows([None, block()])
    many = AdapterTable(2, 1, hidden_size=12, dtype=torch.float32, device=CPU)
    many.place(0, rows)
    plan = plan_step(np.zeros(3, int), np.full(3, -1), num_rows=1, tile_size=8)
    y = torch.ones(3, 12)
    cpu.bind(many, plan)(y, torch.ones(3, 12), 0)
    assert torch.equal(y, torch.ones(3, 12))


@pytest.mark.parametrize("rows", [[2], [-2], [0, 5]])
def test_refuses_rows_out_of_range(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"the table has 0\.\.1"):
        plan_step(np.array(rows), np.full(len(rows), -1), num_rows=2, tile_size=8)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tiles", [[9, 0, 1]], "a row that the table lacks"),
        ("tiles", [[0, 0, 9999]], "tile is out"),
        ("tokens", 999, "tile is out"),
        ("bias_rows", 7, "bias row is out"),
    ],
)
def test_operator_refuses_plans_that_do_not_fit(
    name: str, value: object, message: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr("mtlora.ops.cpu.compiled_kernel", lambda: None)
    batch = Batch(SHAPE_CLASSES["many-tokens-of-one"], torch.float32)
    if name == "tiles":
        batch.plan.tiles_M3[:1] = torch.tensor(value)
    else:
        getattr(batch.plan, f"{name}_P")[3] = value
    with pytest.raises(ValueError, match=message):
        cpu.add_mixed_paths_(batch.mix)
    assert torch.equal(batch.y_TD, batch.before_TD)


def test_operator_refuses_tensors_of_the_wrong_kind() -> None:
    batch = Batch(SHAPE_CLASSES["many-tokens-of-many"], torch.float32)
    y, x, rows, tokens, bias_rows, tiles = batch.mix
    bad = {
        "both be": (y[:1], x, rows, tokens, bias_rows, tiles),
        "x and y must share": (y.double(), x, rows, tokens, bias_rows, tiles),
        "x's rows": (y, x.t().contiguous().t(), rows, tokens, bias_rows, tiles),
        "y's rows": (y[:1].expand(len(y), -1), x, rows, tokens, bias_rows, tiles),
        "rows must be": (y, x, rows.int(), tokens, bias_rows, tiles),
        "rows must be contiguous": (y, x, rows[::2], tokens, bias_rows, tiles),
        "tokens must be": (y, x, rows, tokens.long(), bias_rows, tiles),
        "one a token": (y, x, rows, tokens, bias_rows[1:], tiles),
        "tiles must be": (y, x, rows, tokens, bias_rows, tiles[:, :2]),
        "another dtype": (y.bfloat16(), x.bfloat16(), rows, tokens, bias_rows, tiles),
        "another dtype or hidden size": (y[:, 1:], x[:, 1:], rows, tokens, bias_rows, tiles),
    }
    for message, tensors in bad.items():
        with pytest.raises(ValueError, match=message):
            cpu.add_mixed_paths_(Mix(*tensors))
    assert torch.equal(batch.y_TD, batch.before_TD)


def test_device_plan_copies_what_is_used_to_one_place() -> None:
    config = KernelConfig(12, torch.float32, num_blocks=1, max_adapters=3, max_tokens=8, num_sms=4)
    plan = DevicePlan(config, CPU)
    counts_AC = np.stack([counts_of(sizes, 12) for sizes in ([(2, 3, 2)], [], [(4, 20, 1)])])
    address = plan.words_W.data_ptr()
    rng = np.random.default_rng(0)
    for tokens in (8, 1, 5, 0, 8, 8):
        plan.words_W.fill_(-7)
        row_T = rng.integers(-1, 3, tokens)
        step = plan_step(row_T, row_T, num_rows=3, tile_size=4)
        plan.set(step, counts_AC)
        used = len(step.words_W)
        assert plan.words_W.data_ptr() == address
        assert plan.words_W[:used].tolist() == step.words_W.tolist()
        assert (plan.words_W[used:] == -7).all()
        assert step.words_W[Header.COLUMNS] == max([0, *counts_AC[row_T[row_T >= 0], 0]])
        assert step.words_W[Header.SAMPLE_BLOCK] == -1
    with pytest.raises(ValueError, match="9 tokens"):
        plan.set(plan_step(np.zeros(9, int), np.zeros(9, int), num_rows=3, tile_size=4), counts_AC)


def test_a_pinned_buffer_is_written_only_after_its_last_copy() -> None:
    """Events and buffers are stubs that write down their calls."""
    calls: list[str] = []

    class Buffer:
        def __init__(self, turn: int) -> None:
            self.turn = turn

        def __getitem__(self, used: slice) -> "Buffer":
            return self

        def __setitem__(self, used: slice, words_W: np.ndarray) -> None:
            calls.append(f"written {self.turn}")

    class OnDevice:
        def __getitem__(self, used: slice) -> "OnDevice":
            return self

        def copy_(self, staged: Buffer, *, non_blocking: bool) -> None:
            assert non_blocking
            calls.append(f"copied {staged.turn}")

    def event(turn: int) -> SimpleNamespace:
        return SimpleNamespace(
            synchronize=lambda: calls.append(f"awaited {turn}"), record=lambda: calls.append(f"recorded {turn}")
        )

    config = KernelConfig(12, torch.float32, num_blocks=1, max_adapters=1, max_tokens=8)
    plan = DevicePlan(config, CPU, ring=3)
    plan._arrays, plan._staged, plan._copied = ([f(i) for i in range(3)] for f in (Buffer, Buffer, event))  # type: ignore[assignment]
    plan.words_W = OnDevice()  # type: ignore[assignment]
    counts_AC, first = counts_of([(2, 3, 2)], 12)[None], plan._next + 1
    for _ in range(5):
        plan.set(plan_step(np.zeros(2, int), np.zeros(2, int), num_rows=1, tile_size=16), counts_AC)
    turns = [(first + i) % 3 for i in range(5)]
    assert calls == [f"{what} {turn}" for turn in turns for what in ("awaited", "written", "copied", "recorded")]


def test_weights_are_copied_beside_the_steps_and_rows_written_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and events are stubs that write down their calls."""
    calls: list[str] = []
    copies = SimpleNamespace(wait_stream=lambda stream: calls.append(f"copies wait for {stream}"))
    event = SimpleNamespace(
        record=lambda: calls.append("arrival recorded"), wait=lambda: calls.append("arrival awaited")
    )

    @contextlib.contextmanager
    def stream(other: object) -> Iterator[None]:
        assert other is copies
        calls.append("to copies")
        yield
        calls.append("back")

    copy_ = torch.Tensor.copy_

    def noted_copy_(tensor: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        calls.append(f"{'weights' if tensor.dtype == torch.uint8 else 'rows'} copied, non-blocking {non_blocking}")
        return copy_(tensor, source)

    rows = AdapterRows([block()], layout=Layout.PADDED)
    on_gpu = table(config=KernelConfig(12, torch.float32, num_blocks=1, max_adapters=2, max_tokens=8))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the steps")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.Tensor, "copy_", noted_copy_)
    # Their memory belongs to the steps' stream; without this, it could be reused while the copy runs.
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, of: calls.append(f"kept for {of is copies}"))
    moved = rows.to(CPU, copies)  # type: ignore[arg-type]
    weights = [
        "copies wait for the steps",
        "to copies",
        "weights copied, non-blocking True",
        "arrival recorded",
        "back",
    ]
    assert calls == [*weights, "kept for True"]
    calls.clear()
    on_gpu.place(0, moved)
    assert calls == ["arrival awaited", "rows copied, non-blocking True"]


@given(st.lists(st.integers(-1, 5), max_size=200), st.sampled_from([8, 16, 64]))
def test_plans_are_whole(rows: list[int], tile_size: int) -> None:
    row_T = np.array(rows, dtype=int)
    plan = plan_step(row_T, np.arange(len(rows)), num_rows=6, tile_size=tile_size)
    seen: list[int] = []
    for row, first, count in plan.tiles_M3.tolist():
        assert 0 < count <= tile_size
        tokens = plan.tokens_P[first : first + count].tolist()
        assert all(row_T[t] == row for t in tokens)
        seen += tokens
    assert sorted(seen) == np.flatnonzero(row_T >= 0).tolist()
    assert torch.equal(plan.bias_rows_P, plan.tokens_P)
    sizes = plan.tiles_M3[:, 2].numpy()
    for row in set(rows) - {-1}:
        assert np.ptp(sizes[plan.tiles_M3[:, 0].numpy() == row]) <= 1


def test_parts_fill_the_card_and_fit_the_scratch_space() -> None:
    config = KernelConfig(4096, torch.bfloat16, num_blocks=32, max_adapters=64, max_tokens=8192, num_sms=132)
    assert [tuning.parts(config, tiles, 48, 16 * tiles) for tiles in (1, 4, 16, 64, 200)] == [8, 8, 8, 2, 1]
    for tiles in (1, 5, 40):
        for tokens in (1, 500, 3000, 8192):
            assert 1 <= tuning.parts(config, tiles, 48, tokens) <= max(1, config.scratch_rows // tokens)
    assert tuning.parts(replace(config, hidden_size=576), 1, 48, 16) == 4


def test_alignment_holds_for_every_number_of_groups() -> None:
    sizes = {4096: 16, 3584: 16, 576: 2, 90: 1}
    for hidden_size, alignment in sizes.items():
        config = KernelConfig(hidden_size, torch.bfloat16, num_blocks=1, max_adapters=1, max_tokens=1)
        assert config.alignment == alignment


def test_products_of_many_tokens_are_pipelined_where_the_assembler_is_sound() -> None:
    sound = {(80, "12.8"): True, (90, "12.8"): False, (90, "13.2"): False, (90, "13.3"): True, (90, "13.10"): True,
             (90, "14.0"): True, (100, "12.8"): True}  # fmt: skip
    assert {key: tuning.may_pipeline(*key) for key in sound} == sound
    config = KernelConfig(4096, torch.bfloat16, num_blocks=1, max_adapters=1, max_tokens=1, pipelined=False)
    assert tuning.cut(config, 1024).expand_stages == 1


@pytest.mark.parametrize(("ptxas", "pipelined"), [("12.8", False), ("13.4", True)])
def test_the_config_of_a_card_has_its_sizes_and_its_assembler(
    monkeypatch: pytest.MonkeyPatch, ptxas: str, pipelined: bool
) -> None:
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    asked = []

    def get_ptxas(capability: int) -> SimpleNamespace:
        asked.append(capability)
        return SimpleNamespace(version=ptxas)

    card = SimpleNamespace(major=9, minor=0, multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(compiler, "get_ptxas", get_ptxas)
    sizes = {"hidden_size": 96, "dtype": torch.float16, "num_blocks": 2, "max_adapters": 3, "max_tokens": 600}
    found = tuning.on_this_card(torch.device("cuda"), **sizes)
    assert found == KernelConfig(**sizes, num_sms=114, capability=90, pipelined=pipelined)
    assert asked == [90]


@given(
    st.lists(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 5), st.sampled_from([1, 2, 3])), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2),
)
def test_padded_rows_hold_the_weights_in_one_piece(sizes: list, dtype: torch.dtype, biases: int) -> None:
    blocks = []
    for size in sizes:
        if size is None:
            blocks.append(None)
            continue
        r, N, G = size
        bias = torch.randn(biases, G, N) if biases else None
        blocks.append(
            PackedBlock(torch.randn(12, r + G * N).to(dtype), torch.randn(G, N * r, 12 // G).to(dtype), r, bias)
        )
    rows = AdapterRows(blocks, layout=Layout.PADDED)
    moved = rows.to(CPU)
    assert moved.num_bytes == rows.num_bytes
    memory = moved._bytes
    for block, fields in zip(blocks, moved.rows_LF.tolist(), strict=True):
        if block is None:
            assert not any(fields)
            continue
        for field, tensor in ((Field.SHRINK, block.shrink_DS), (Field.EXPAND, block.expand_GKE)):
            start, length = fields[field] - memory.data_ptr(), tuning.padded(tensor.shape[-1])
            assert fields[field] % 16 == 0
            count = tensor[..., 0].numel() * length
            held = memory[start : start + count * dtype.itemsize].view(dtype).view(*tensor.shape[:-1], length)
            assert torch.equal(held[..., : tensor.shape[-1]], tensor)
        if block.bias_bGN is not None:
            start = fields[Field.BIAS] - memory.data_ptr()
            held = memory[start : start + block.bias_bGN.nbytes].view(torch.float32).view(block.bias_bGN.shape)
            assert torch.equal(held, block.bias_bGN)
