"""The claim's finished cells in one file, `docs/claim-results.jsonl`, so that another machine goes on from them."""

import json
from pathlib import Path

from mtlora.files import replace_file
from mtlora.sweep.grid import RESULT

KEPT = Path(__file__).parents[2] / "docs" / "claim-results.jsonl"


def restore(kept: Path, out: Path) -> None:
    """Write the results of `kept` that `out` lacks, each into its cell's folder."""
    for line in kept.read_text().splitlines() if kept.exists() else ():
        cell = json.loads(line)
        file = out / cell["folder"] / RESULT
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, (json.dumps(cell["result"], indent=1) + "\n").encode())


def keep(out: Path, kept: Path) -> None:
    """Write every finished cell of `out` into `kept`, a line each, in the order of their folders."""
    cells = ((file.parent.relative_to(out), json.loads(file.read_bytes())) for file in sorted(out.rglob(RESULT)))
    lines = (
        json.dumps({"folder": str(folder), "result": result}, separators=(",", ":")) + "\n"
        for folder, result in cells
        if "error" not in result or result.get("diverged")
    )
    replace_file(kept, "".join(lines).encode())
