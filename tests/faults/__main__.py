"""`python -m tests.faults`: run the scenarios, print a row each, and a last line that machines read.

A scenario is a module of this package that has `run(options: Options) -> Row`; `ORDER`, an int, places it. Scenarios
that use a shared server, `shared` or `tenanted`, follow one another. What depends on the machine's speed, such as a
load or the length of a measurement, follows from the server's `pace`. Settings in the environment apply to all servers:
as on a slow machine, `MTLORA_DTYPE=float32 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 make faults`.
"""

import argparse
import importlib
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.cli.process import exit_on_sigterm
from tests.faults._shared import Shared
from tests.faults.scenario import Options, Row

Run = Callable[[Options], Row]


def scenarios() -> dict[str, Run]:
    """Every scenario by the name of its module, in order."""
    modules = [
        importlib.import_module(f"{__package__}.{info.name}")
        for info in pkgutil.iter_modules(sys.modules[__package__].__path__)
        if not info.name.startswith(("_", "test_"))
    ]
    found = [module for module in modules if hasattr(module, "run")]
    return {module.__name__.rpartition(".")[2]: module.run for module in sorted(found, key=lambda m: m.ORDER)}


def shared_servers(run: Run) -> list[Shared[Any]]:
    """The shared servers that a scenario uses."""
    return [value for value in vars(sys.modules[run.__module__]).values() if isinstance(value, Shared)]


def main(arguments: list[str] | None = None) -> int:
    """Run scenarios. Returns 0 if every goal is met."""
    known = scenarios()
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="full length instead of the short form")
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="SCENARIO")
    options = parser.parse_args(arguments)
    exit_on_sigterm()
    rows: list[Row] = []
    started = time.monotonic()
    for name in options.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"faults-{name}-") as folder:
            row = _run(
                known[name],
                name,
                Options(options.backbone, options.adapters.resolve(), Path(folder), options.seed, options.full),
            )
        rows.append(row)
        needed = [server for later in options.only[len(rows) :] for server in shared_servers(known[later])]
        for server in shared_servers(known[name]):
            if server not in needed:
                server.close()
        verdict = "met" if row.met else "MISSED"
        print(
            f"{row.name:<42} {verdict:<7} {row.figure}  (goal: {row.goal}; {time.monotonic() - began:.0f} s)",
            flush=True,
        )
    met = sum(row.met for row in rows)
    print(f"total: {time.monotonic() - started:.0f} s")
    print(f"faults: {len(rows)} rows, {met} met")
    return 0 if met == len(rows) else 1


def _run(run: Run, name: str, options: Options) -> Row:
    try:
        return run(options)
    except Exception as error:
        import traceback

        traceback.print_exc()
        return Row(name, "runs to its end", f"failed: {type(error).__name__}: {error}", met=False)


if __name__ == "__main__":
    sys.exit(main())
