"""`make bench`: throughput through the real engine, adapters against the bare backbone and against the field.

Every engine is a process that lives through the whole run; cases take turns, so that what else the machine does falls
on all of them alike. Ratios are medians of each round's own ratio.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mtlora.backbone import identify, resolve
from mtlora.bench.adapters import link_adapter, write_random_adapter, write_random_peft
from mtlora.bench.load import LOADS, REFERENCE, Load

Slot = tuple[str, int, str] | None

BATCH = 64
_ENGINE = {
    "dtype": "bfloat16", "max_num_seqs": BATCH, "max_model_len": 1024, "enforce_eager": True,
    "enable_prefix_caching": False, "disable_log_stats": True, "seed": 0,
}  # fmt: skip


class EngineProcess:
    """A `mtlora.bench.worker` with its own settings and environment."""

    def __init__(self, backbone: Path, environment: dict[str, str], **settings: Any) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="mtlora-bench-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mtlora.bench.worker", json.dumps({"model": str(backbone), **_ENGINE, **settings})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
                 "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": _all_cores(),
                 **environment},
        )  # fmt: skip

    def __enter__(self) -> "EngineProcess":
        try:
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    def seconds(self, load: Load, slots: Sequence[Slot], vocabulary: int, seed: int) -> float:
        """Seconds for one load, request i with slots[i % len(slots)] in shuffled order."""
        prompts = load.prompts(vocabulary, seed)
        given = [slots[i % len(slots)] for i in range(len(prompts))]
        random.Random(seed).shuffle(given)
        case = {"prompts": prompts, "new_tokens": load.new_tokens, "slots": given}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        if reply["tokens"] != load.requests * load.new_tokens:
            raise RuntimeError(f"{reply['tokens']} tokens instead of {load.requests * load.new_tokens}")
        return float(reply["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended: {Path(self._log.name).read_text()[-2000:]}")
        return dict(json.loads(line))


@dataclass(frozen=True)
class Case:
    """One row: an engine, and the slot of each request in turn."""

    name: str
    engine: EngineProcess
    slots: Sequence[Slot]


def _all_cores() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))))


def main() -> int:
    """Run every case in turn, several rounds; print rows and ratios, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", choices=sorted(LOADS), default=REFERENCE.name)
    parser.add_argument("--skip-field", action="store_true", help="leave vLLM's own multi-LoRA and PEFT out")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    load = LOADS[args.load]
    folder = resolve(args.backbone)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = _cases(stack, folder, temporary, field=not args.skip_field)
        seconds = _run(cases, load, args.rounds, json.loads((folder / "config.json").read_text())["vocab_size"])
    report = _report(load, seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"engine-{load.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    _print(report)
    return 0


def _cases(stack: ExitStack, folder: Path, temporary: Path, *, field: bool) -> list[Case]:
    identity = identify(folder)
    config = json.loads((folder / "config.json").read_text())

    def adapter(name: str, num_tasks: int, seed: int) -> Path:
        write_random_adapter(temporary / name, identity, num_tasks=num_tasks, seed=seed)
        return temporary / name

    one, many = adapter("one", 25, 1), adapter("many", 1000, 2)
    several = [adapter(f"several-{i}", 1, 100 + i) for i in range(25)]
    for i in range(256):
        link_adapter(several[i % 25], temporary / f"zipf-{i}")
    ids = iter(range(1, 100_000))

    def slot(path: Path, task: str) -> Slot:
        return (f"{path.name}#{task}", next(ids), f"{path}#{task}")

    # In a fixed order of popularity, request by request: what a Zipf law of exponent 1 gives.
    zipf = [slot(temporary / f"zipf-{i}", "task-0") for i in range(256)]
    drawn = random.Random(0).choices(zipf, weights=[1 / (1 + i) for i in range(256)], k=400)
    bare = stack.enter_context(EngineProcess(folder, {}))
    routed = stack.enter_context(EngineProcess(folder, {}, enable_lora=True, max_loras=BATCH, max_cpu_loras=2048))
    narrow = stack.enter_context(EngineProcess(folder, {}, enable_lora=True, max_loras=32, max_cpu_loras=32))
    cases = [
        Case("backbone", bare, [None]),
        Case("one-adapter-25-tasks", routed, [slot(one, f"task-{i}") for i in range(25)]),
        Case("25-adapters", routed, [slot(path, "task-0") for path in several]),
        Case("1000-tasks", routed, [slot(many, f"task-{i}") for i in range(1000)]),
        Case("32-adapters", narrow, zipf[:32]),
        Case("256-adapters-zipf", narrow, drawn),
    ]
    if field:
        for i in range(25):
            write_random_peft(temporary / f"peft-{i}", config, seed=i)
        stock = stack.enter_context(
            EngineProcess(
                folder, {"MTLORA_PLUGIN": "0"}, enable_lora=True, max_loras=25, max_cpu_loras=25, max_lora_rank=16
            )
        )
        cases.append(
            Case("vllm-multi-lora", stock, [(f"peft-{i}", i + 1, str(temporary / f"peft-{i}")) for i in range(25)])
        )
    return cases


def _run(cases: Sequence[Case], load: Load, rounds: int, vocabulary: int) -> dict[str, list[float]]:
    """Seconds of every case, a list of rounds; the slow case of the field runs in the first two rounds alone."""
    warm_up = Load("warm-up", 8, load.prompt_tokens, 4)
    for case in cases:
        case.engine.seconds(warm_up, case.slots, vocabulary, seed=0)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    with tqdm(total=rounds * len(cases), unit="case", desc="bench") as bar:
        for round_number in range(rounds):
            turn = list(cases)
            random.Random(round_number).shuffle(turn)
            for case in turn:
                bar.set_postfix_str(case.name)
                if case.name != "vllm-multi-lora" or round_number < 2:
                    seconds[case.name].append(case.engine.seconds(load, case.slots, vocabulary, seed=round_number))
                bar.update()
    return seconds


_RATIOS = (
    ("one-adapter-25-tasks", "backbone"), ("25-adapters", "backbone"), ("1000-tasks", "one-adapter-25-tasks"),
    ("25-adapters", "vllm-multi-lora"), ("256-adapters-zipf", "32-adapters"),
)  # fmt: skip
_RATIO_NAMES = {("1000-tasks", "one-adapter-25-tasks"): "1000-tasks/25-tasks"}


def _report(load: Load, seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {}
    for over, under in _RATIOS:
        if seconds.get(over) and seconds.get(under):
            each = [b / a for a, b in zip(seconds[over], seconds[under], strict=False)]
            name = _RATIO_NAMES.get((over, under), f"{over}/{under}")
            ratios[name] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    rows = {
        name: {
            "requests_per_second": load.requests / statistics.median(values),
            "seconds": values,
        }
        for name, values in seconds.items()
    }
    return {
        "load": vars(load),
        "made": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "rows": rows,
        "ratios": ratios,
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "requests/s", "seconds, median", "min", "max", title=f"load: {report['load']['name']}")
    for name, row in report["rows"].items():
        s = row["seconds"]
        table.add_row(
            name, f"{row['requests_per_second']:.2f}", f"{statistics.median(s):.2f}", f"{min(s):.2f}", f"{max(s):.2f}"
        )
    Console().print(table)
    for name, ratio in report["ratios"].items():
        if name == "256-adapters-zipf/32-adapters":
            print(f"{name} {ratio['median']:.2f} (goal 0.85)")
    for name, ratio in report["ratios"].items():
        if name != "256-adapters-zipf/32-adapters":
            print(f"bench: {name} {ratio['median']:.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
