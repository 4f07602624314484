"""What tables, plans and the operator refuse, before any kernel runs; and what placing an adapter does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mtlora.ops.operators import add_mixed_paths_
from mtlora.ops.packed_block import PackedBlock
from mtlora.ops.plan import DevicePlan, StepPlan, plan_step
from mtlora.ops.table import AdapterRows, AdapterTable, TableLimits
from tests.mtlora.ops.cases import SHAPE_CLASSES, Batch

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
    fixed = table(limits=TableLimits(rank=2, experts=3, groups=2, alignment=2))
    fixed.place(0, AdapterRows([block()]))
    with pytest.raises(ValueError, match="in a table of"):
        fixed.place(1, AdapterRows([block(r=4)]))


def test_placing_is_in_place_and_can_be_undone() -> None:
    batch = Batch(SHAPE_CLASSES["many-tokens-of-many"], torch.float32)
    address, held = batch.table.rows_LAF.data_ptr(), batch.table.held(0)
    batch.table.place(0, None)
    batch.table.place(0, held)
    assert batch.table.rows_LAF.data_ptr() == address
    torch.ops.mtlora.add_mixed_paths_(*batch.mix, [], 8)
    batch.check()
    for row in range(batch.table.num_rows):
        batch.table.place(row, None)
    before = batch.y_TD.clone()
    torch.ops.mtlora.add_mixed_paths_(*batch.mix, [], 8)
    assert torch.equal(batch.y_TD, before)


def test_a_block_without_a_path_adds_nothing() -> None:
    rows = AdapterRows([None, block()])
    many = AdapterTable(2, 1, hidden_size=12, dtype=torch.float32, device=CPU)
    many.place(0, rows)
    plan = plan_step(np.zeros(3, int), np.full(3, -1), num_rows=1, tile_size=8)
    y = torch.ones(3, 12)
    add_mixed_paths_(y, torch.ones(3, 12), many, 0, plan)
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
    plan = batch.plan
    if name == "tiles":
        batch.plan = replace(plan, tiles_M3=torch.tensor(value, dtype=torch.int32))
    else:
        getattr(plan, f"{name}_P")[3] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.mtlora.add_mixed_paths_(*batch.mix, [], 8)
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
            torch.ops.mtlora.add_mixed_paths_(*tensors, [], 8)
    with pytest.raises(ValueError, match="the table's adapters"):
        add_mixed_paths_(y.bfloat16(), x.bfloat16(), batch.table, 0, batch.plan)
    assert torch.equal(batch.y_TD, batch.before_TD)


def test_device_plan_keeps_its_buffers() -> None:
    buffers = DevicePlan(8, 3, tile_size=4, device=CPU)
    address = buffers.plan.tokens_P.data_ptr()
    rng = np.random.default_rng(0)
    for tokens in (8, 1, 5, 0):
        row_T = rng.integers(-1, 3, tokens)
        plan, expected = buffers.set(row_T, row_T), plan_step(row_T, row_T, num_rows=3, tile_size=4)
        assert plan.tokens_P.data_ptr() == address
        num_tiles = len(expected.tiles_M3)
        assert torch.equal(plan.tiles_M3[:num_tiles], expected.tiles_M3)
        assert not plan.tiles_M3[num_tiles:, 2].any()
        assert torch.equal(plan.tokens_P[: len(expected.tokens_P)], expected.tokens_P)
    with pytest.raises(ValueError, match="9 tokens"):
        buffers.set(np.zeros(9, int), np.zeros(9, int))


def test_a_plan_holds_every_token_once() -> None:
    row_T = np.random.default_rng(1).integers(-1, 4, 100)
    plan = plan_step(row_T, np.arange(100), num_rows=4, tile_size=8)
    seen = []
    for row, first, count in plan.tiles_M3.tolist():
        assert 0 < count <= 8
        tokens = plan.tokens_P[first : first + count].tolist()
        assert all(row_T[t] == row for t in tokens)
        seen += tokens
    assert sorted(seen) == np.flatnonzero(row_T >= 0).tolist()
    assert torch.equal(plan.bias_rows_P, plan.tokens_P)


def test_traces_without_running() -> None:
    batch = Batch(SHAPE_CLASSES["many-tokens-of-many"], torch.float32)
    limits = [16, 8, 4, 1]
    torch.library.opcheck(
        torch.ops.mtlora.add_mixed_paths_.default, (*batch.mix, limits, 8),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_runs_inside_a_compiled_function() -> None:
    batch = Batch(SHAPE_CLASSES["many-tokens-of-many"], torch.float32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(y: torch.Tensor, x: torch.Tensor, *plan: torch.Tensor) -> torch.Tensor:
        torch.ops.mtlora.add_mixed_paths_(y, x, *plan, [16, 8, 4, 1], 8)
        return y * 1.0

    batch.y_TD = step(*batch.mix)
    batch.check()


def test_step_plan_has_the_operators_dtypes() -> None:
    plan = plan_step(np.array([0, 1]), np.array([-1, -1]), num_rows=2, tile_size=8)
    assert isinstance(plan, StepPlan)
    assert {plan.tokens_P.dtype, plan.bias_rows_P.dtype, plan.tiles_M3.dtype} == {torch.int32}
