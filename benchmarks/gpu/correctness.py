"""Both kernels against the formula in float64, over every class of shapes: on a card, or in Triton's interpreter."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.adapters import config_for
from benchmarks.gpu.cases import SHAPE_CLASSES, TOLERANCE, Batch, Case, Shape, mixed, random_rows
from mtlora.ops import tuning
from mtlora.ops.plan import DevicePlan
from mtlora.ops.table import Layout

# Padding rows after a step's tokens, as in a captured graph: x holds NaN there, and y must not change.
PADDING = 3
# Seconds that a decoder's checks and measurements need.
TO_SERVE = 300

_SIZES = (
    Shape(4, 1, 1), Shape(8, 64, 1), Shape(16, 8, 4, 3), Shape(32, 5, 8), Shape(64, 16, 2), Shape(128, 4, 32, 2),
    Shape(7, 3, 3), None,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A case in a dtype: its relative error, and whether rows without an adapter, padding too, kept their bits."""

    name: str
    error: float
    untouched: bool
    tolerance: float

    @property
    def right(self) -> bool:
        """Whether the kernels computed the formula."""
        return self.untouched and self.error < self.tolerance


def cases() -> dict[str, Case]:
    """Every class of shapes: those of cases.py, and hidden sizes up to 8,192 in steps of one, some and many tokens."""
    found = dict(SHAPE_CLASSES)
    for hidden in (576, 896, 3584, 4096, 8192):
        fitting = tuple(shape for shape in _SIZES if shape is None or hidden % shape.G == 0)
        for tokens in (1, 40, 600):
            # Give only a few tokens of a large step an adapter, because the oracle is slow.
            rows, bias_rows = np.array(random_rows(fitting, tokens, tokens))
            rows[200:] = -1
            found[f"hidden-{hidden}-tokens-{tokens}"] = Case(
                hidden, fitting, tuple(rows.tolist()), tuple(np.where(rows < 0, -1, bias_rows).tolist()), tokens
            )
    return found


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """bfloat16 for every case, the others for some: a compilation takes a second."""
    further = {"rank-64": torch.float16, "ragged-sizes": torch.float32, "many-tokens-of-one": torch.float32}
    if name.startswith("hidden-4096"):
        return torch.bfloat16, torch.float16
    return (torch.bfloat16, further[name]) if name in further else (torch.bfloat16,)


def small_cases() -> dict[str, Case]:
    """A few small ones, for the interpreter."""
    names = ("one-token", "groups-1-and-32", "ragged-sizes")
    return {name: SHAPE_CLASSES[name] for name in names} | {"tiles-of-64": mixed(70, 32, (Shape(4, 2, 2, 2), None))}


def run(name: str, case: Case, dtype: torch.dtype, device: torch.device, padded_tokens: int | None = None) -> Result:
    """Run one case in a step of `padded_tokens`, by default a few more than it has."""
    # Import here: the interpreter must be chosen before Triton is imported.
    from mtlora.ops.triton_gpu import Buffers, Path

    T = len(case.rows)
    padded_tokens = padded_tokens or T + PADDING
    config = config_for(
        device, hidden_size=case.D, dtype=dtype, num_blocks=1, max_adapters=len(case.shapes), max_tokens=padded_tokens,
        max_rank=128, max_experts=64, max_groups=32,
    )  # fmt: skip
    batch = Batch(
        case, dtype, str(device), tuning.tile_size(padded_tokens), layout=Layout.PADDED, config=config
    )  # fmt: skip
    plan = DevicePlan(config, device)
    plan.set(batch.plan, batch.table.counts_AC)
    buffers = Buffers.of(config, plan.words_W, batch.table.rows_LAF.transpose(0, 1))
    buffers.scratch_QC.fill_(float("nan"))
    x_TD = torch.full((padded_tokens, case.D), float("nan"), dtype=dtype, device=device)
    y_TD = torch.ones_like(x_TD)
    x_TD[:T], y_TD[:T] = batch.x_TD, batch.y_TD
    path = Path(config, buffers)
    path.begin(x_TD, 0)
    path.finish_(y_TD, 0)
    y_TD = y_TD.cpu()
    alone_T = batch.untouched_T
    untouched = torch.equal(y_TD[:T][alone_T], batch.before_TD[alone_T]) and bool((y_TD[T:] == 1).all())
    error = float((y_TD[:T].double() - batch.expected_TD).norm() / batch.expected_TD.norm())
    return Result(f"{name}, {str(dtype).removeprefix('torch.')}", error, untouched, TOLERANCE[dtype])


def check_all(device: torch.device, seconds_left: Callable[[], float], *, small: bool) -> tuple[int, int]:
    """(right, all) of the cases, in their dtypes; prints what is wrong. A case without time is not right."""
    todo = [
        (name, case, dtype)
        for name, case in (small_cases() if small else cases()).items()
        for dtype in ((torch.bfloat16,) if small else dtypes_of(name))
    ]
    results = []
    for name, case, dtype in todo:
        if seconds_left() < TO_SERVE:
            break
        result = run(name, case, dtype, device)
        results.append(result)
        if not result.right:
            note = "" if result.untouched else "; rows without an adapter changed"
            print(f"wrong: {result.name}: relative error {result.error:.1e}{note}")
    right, skipped = sum(result.right for result in results), len(todo) - len(results)
    worst = max((result.error / result.tolerance for result in results), default=0.0)
    print(
        f"kernels: {right} of {len(todo)} cases right, {skipped} skipped for lack of time, "
        f"largest error {worst:.0%} of its tolerance"
    )
    return right, len(todo)
