"""`make bench`: throughput of the engine with adapters, compared with the bare backbone and with other systems.

Every engine is a process that lives through the whole run. Cases take turns, so that other load on the machine affects
all of them alike. A ratio is the median of the rounds' ratios.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.engine.prompts import LOADS, REFERENCE, RandomPrompts
from benchmarks.harness.adapters import (
    Slot,
    link_adapter,
    random_tasks,
    task_slots,
    write_random_adapter,
    write_random_pefts,
)
from benchmarks.harness.environment import engine_environment, usable_cores
from benchmarks.harness.percentile import spread
from benchmarks.harness.worker import WorkerProcess
from mtlora.backbone import identify, resolve
from mtlora.cli.output import print_table
from mtlora.vllm_cpu.precision import engine_dtype
from mtlora.vllm_plugin.seams import ENVIRONMENT_SWITCH

BATCH = 64
_ENGINE = {
    "max_num_seqs": BATCH, "max_model_len": 1024, "enforce_eager": True,
    "enable_prefix_caching": False, "disable_log_stats": True, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row: an engine's worker, and the slots that its requests ask for.

    weights: probabilities to draw slots by; None: slots in turn. sample: number of the load's requests to run; None:
    all. rounds: number of rounds to run in; None: all.
    """

    name: str
    worker: WorkerProcess
    slots: Sequence[Slot | None]
    weights: Sequence[float] | None = None
    sample: int | None = None
    rounds: int | None = None

    def part_of(self, load: RandomPrompts) -> RandomPrompts:
        """The part of the load that this case runs."""
        return load if self.sample is None else replace(load, requests=min(self.sample, load.requests))

    def seconds(self, load: RandomPrompts, vocabulary: int, seed: int) -> float:
        """Seconds for its part of a load."""
        part = self.part_of(load)
        return self._ask(part, self.slots_of(part.requests, seed), vocabulary, seed)

    def slots_of(self, requests: int, seed: int) -> list[Slot | None]:
        """The slot of each request: all equally often; if slots outnumber requests, others for every seed."""
        rng = random.Random(seed)
        if self.weights:
            return rng.choices(self.slots, self.weights, k=requests)
        times, rest = divmod(requests, len(self.slots))
        chosen = [*self.slots] * times + rng.sample(self.slots, rest)
        rng.shuffle(chosen)
        return chosen

    def warm_up(self, load: RandomPrompts, vocabulary: int) -> None:
        """A few requests of the load's prompts; then one for every slot, so that the engine knows them all.

        Skips the second part if slots are drawn, because the engine cannot keep all of them.
        """
        self.seconds(RandomPrompts("warm-up", 8, load.prompt_tokens, 4), vocabulary, seed=0)
        if not self.weights:
            self._ask(RandomPrompts("slots", len(self.slots), (4, 8), 1), list(self.slots), vocabulary, seed=0)

    def _ask(self, part: RandomPrompts, slots: list[Slot | None], vocabulary: int, seed: int) -> float:
        prompts = part.draw(vocabulary, seed)
        reply = self.worker.ask({"prompts": prompts, "new_tokens": part.new_tokens, "slots": slots})
        if reply["tokens"] != part.requests * part.new_tokens:
            raise RuntimeError(f"{reply['tokens']} tokens instead of {part.requests * part.new_tokens}")
        return float(reply["seconds"])


@dataclass(frozen=True)
class Ratio:
    """Throughput of one row divided by that of another, and its goal, in float32 perhaps another.

    `contract` ratios are the last lines.
    """

    over: str
    under: str
    goal: float | None
    contract: bool = True
    name: str = ""
    float32: float | None = None

    def goal_in(self, dtype: str) -> float | None:
        return self.float32 if self.float32 and dtype == "float32" else self.goal

    def __str__(self) -> str:
        return self.name or f"{self.over}/{self.under}"


RATIOS = (
    Ratio("256-adapters-zipf", "32-adapters", 0.85, contract=False),
    Ratio("25-adapters", "peft-mixed-batches", None, contract=False),
    # On CPUs the plugin speeds up the backbone without adapters too; the other ratios compare with the faster one.
    Ratio("backbone", "vllm-backbone", None, contract=False),
    Ratio("one-adapter-25-tasks", "backbone", 0.97),
    Ratio("25-adapters", "backbone", 0.90, float32=0.95),
    Ratio("1000-tasks", "one-adapter-25-tasks", 0.97, name="1000-tasks/25-tasks"),
    Ratio("25-adapters", "vllm-multi-lora", 7.0),
)
# Rounds of slow cases, and of cases whose ratios are far from their goals.
_FEW_ROUNDS = 2


def main() -> int:
    """Run every case in turn in several rounds. Print rows and ratios, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--rounds", type=int, default=4, help="slow rows have fewer; default: %(default)s")
    parser.add_argument("--load", choices=sorted(LOADS), default=REFERENCE.name)
    parser.add_argument("--skip-field", action="store_true", help="without vLLM's own multi-LoRA and PEFT")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    load = LOADS[args.load]
    folder = resolve(args.backbone)
    # Use the server's dtype; PEFT's worker needs its name.
    dtype = engine_dtype("auto", folder).replace("auto", "bfloat16")
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = _cases(stack, folder, dtype, temporary, field=not args.skip_field)
        seconds = _run(cases, load, args.rounds, json.loads((folder / "config.json").read_text())["vocab_size"])
        report = make_report(load, {case.name: case.part_of(load).requests for case in cases}, seconds, dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"engine-{load.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    _print(report)
    return 0


def _cases(stack: ExitStack, folder: Path, dtype: str, temporary: Path, *, field: bool) -> list[Case]:
    identity = identify(folder)
    config = json.loads((folder / "config.json").read_text())

    ids = iter(range(1, 100_000))

    def adapter(name: str, num_tasks: int, seed: int) -> list[Slot]:
        write_random_adapter(temporary / name, identity, random_tasks(num_tasks), seed=seed)
        return task_slots(temporary / name, num_tasks, ids)

    several = [slot for i in range(25) for slot in adapter(f"several-{i}", 1, 100 + i)]
    zipf: list[Slot] = []
    for i in range(256):
        link_adapter(temporary / f"several-{i % 25}", temporary / f"zipf-{i}")
        zipf += task_slots(temporary / f"zipf-{i}", 1, ids)

    def worker(module: str, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> WorkerProcess:
        settings = {"model": str(folder), "dtype": dtype, **settings}
        return stack.enter_context(WorkerProcess(module, settings, {**engine_environment(), **(environment or {})}))

    def engine(environment: Mapping[str, str] | None = None, **settings: Any) -> WorkerProcess:
        return worker("benchmarks.engine.worker", {**_ENGINE, **settings}, environment)

    without_plugin = {ENVIRONMENT_SWITCH: "0"}
    bare = engine()
    routed = engine(enable_lora=True, max_loras=BATCH, max_cpu_loras=2048)
    narrow = engine(enable_lora=True, max_loras=32, max_cpu_loras=32)
    cases = [
        Case("backbone", bare, [None]),
        Case("vllm-backbone", engine(without_plugin), [None], rounds=_FEW_ROUNDS),
        Case("one-adapter-25-tasks", routed, adapter("one", 25, 1)),
        Case("25-adapters", routed, several),
        Case("1000-tasks", routed, adapter("many", 1000, 2)),
        Case("32-adapters", narrow, zipf[:32], rounds=_FEW_ROUNDS),
        # Slots drawn by a Zipf law of exponent 1.
        Case("256-adapters-zipf", narrow, zipf, weights=[1 / (1 + i) for i in range(256)], rounds=_FEW_ROUNDS),
    ]
    if field:
        slots = write_random_pefts(temporary, 25, config)
        stock = engine(without_plugin, enable_lora=True, max_loras=25, max_cpu_loras=25, max_lora_rank=16)
        peft = worker("benchmarks.engine.peft_worker", {"batch": BATCH})
        # One full batch, PEFT's best case: its loop over adapters runs for as many requests as possible.
        cases += [
            Case("vllm-multi-lora", stock, slots, rounds=_FEW_ROUNDS),
            Case("peft-mixed-batches", peft, slots, sample=BATCH, rounds=1),
        ]
    return cases


def _run(cases: Sequence[Case], load: RandomPrompts, rounds: int, vocabulary: int) -> dict[str, list[float]]:
    """Seconds of every case's part of the load, by round. A case with fewer rounds runs in the first ones."""
    for case in cases:
        case.warm_up(load, vocabulary)
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    with tqdm(total=rounds * len(cases), unit="case", desc="bench") as bar:
        for round_number in range(rounds):
            turn = list(cases)
            random.Random(round_number).shuffle(turn)
            for case in turn:
                bar.set_postfix_str(case.name)
                if case.rounds is None or round_number < case.rounds:
                    seconds[case.name].append(case.seconds(load, vocabulary, seed=round_number))
                bar.update()
    return seconds


def make_report(
    load: RandomPrompts, requests: Mapping[str, int], seconds: Mapping[str, Sequence[float]], dtype: str
) -> dict[str, Any]:
    """Rows and ratios of a run. requests: of each case in a round. seconds: of each case, by round.

    Ratios are taken round by round. A case with fewer rounds is compared with the first rounds of the other.
    """
    rates = {name: [requests[name] / each for each in values] for name, values in seconds.items() if values}
    ratios = {}
    for ratio in RATIOS:
        if ratio.over in rates and ratio.under in rates:
            each = [a / b for a, b in zip(rates[ratio.over], rates[ratio.under], strict=False)]
            facts: dict[str, Any] = {
                "over": ratio.over,
                "under": ratio.under,
                "goal": ratio.goal_in(dtype),
                "contract": ratio.contract,
            }
            ratios[str(ratio)] = facts | spread(each)
    rows = {
        name: {"requests": requests[name], "requests_per_second": spread(values), "seconds": list(seconds[name])}
        for name, values in rates.items()
    }
    return {
        "load": vars(load),
        "dtype": dtype,
        "made": time.strftime("%Y-%m-%d"),
        "cores": len(usable_cores()),
        "rows": rows,
        "ratios": ratios,
    }


def _print(report: dict[str, Any]) -> None:
    rows = []
    for name, row in report["rows"].items():
        rate = row["requests_per_second"]
        shown = (f"{rate[key]:.2f}" for key in ("median", "min", "max"))
        rows.append((name, f"{len(row['seconds'])} x {row['requests']}", *shown))
    title = f"load: {report['load']['name']}; {report['dtype']} on {report['cores']} cores"
    print_table(title, ("case", "requests", "requests/s, median", "min", "max"), rows)
    for name, ratio in report["ratios"].items():
        if not ratio["contract"]:
            print(f"{name} {ratio['median']:.2f}" + (f" (goal {ratio['goal']:.2f})" if ratio["goal"] else ""))
    for name, ratio in report["ratios"].items():
        if ratio["contract"]:
            print(f"bench: {name} {ratio['median']:.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
