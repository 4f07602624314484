"""The claim's finished cells in one file, `docs/claim-results.jsonl`, so that another machine goes on from them."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from mtlora.files import replace_file
from mtlora.sweep.grid import RESULT

KEPT = Path(__file__).parents[2] / "docs" / "claim-results.jsonl"


def restore(kept: Path, out: Path) -> None:
    """Write the results of `kept` that `out` lacks, each into its cell's folder."""
    for folder, result in _cells(kept):
        file = out / folder / RESULT
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, (json.dumps(result, indent=1) + "\n").encode())


def compare(out: Path, kept: Path) -> str:
    """A table of the accuracies of cells that both `out` and `kept` have; a diverged cell has 0. Empty without any."""
    rows, differences = [], []
    for folder, before in _cells(kept):
        if (file := out / folder / RESULT).exists():
            now, earlier = (each.get("mean_accuracy", 0.0) for each in (json.loads(file.read_bytes()), before))
            differences.append(now - earlier)
            rows.append(f"| {folder} | {earlier:.3f} | {now:.3f} | {now - earlier:+.3f} |\n")
    if not rows:
        return ""
    largest = max(differences, key=abs)
    summary = f"\n{len(rows)} cells: mean difference {fmean(differences):+.3f}, largest {largest:+.3f}\n"
    return "".join(("\n| cell | kept | here | difference |\n| --- | --- | --- | --- |\n", *rows, summary))


def _cells(kept: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder and result of each line."""
    for line in kept.read_text().splitlines() if kept.exists() else ():
        cell = json.loads(line)
        yield cell["folder"], cell["result"]


def keep(out: Path, kept: Path) -> None:
    """Write every finished cell of `out` into `kept`, a line each, in the order of their folders."""
    cells = ((file.parent.relative_to(out), json.loads(file.read_bytes())) for file in sorted(out.rglob(RESULT)))
    lines = (
        json.dumps({"folder": str(folder), "result": result}, separators=(",", ":")) + "\n"
        for folder, result in cells
        if "error" not in result or result.get("diverged")
    )
    replace_file(kept, "".join(lines).encode())
