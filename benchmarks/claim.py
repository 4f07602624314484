"""The paper's claim on images: accuracy against the number of tasks, by method (docs/claim.md). `make claim`.

The same command goes on where it was stopped. Every cell is a run of the sweep's, a folder with its result.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.claim_report import LOWER, UPPER, write_claim
from mtlora.backbone import resolve
from mtlora.sweep.grid import Run, do, read_result, run_folder, task_order
from mtlora.train.config import TrainingConfig

SUITE = "builtin-vision"
COUNTS, SEEDS, RATES, MAPS = (5, 10, 15, 20, 25), (0, 1, 2), (2e-4, 7e-4, 2e-3), (4, 16, 64)
_ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def _lora(r: int, modules: Sequence[str]) -> dict[str, Any]:
    baseline = {"method": "lora", "r": r, "lora_alpha": 2.0 * r, "target_modules": list(modules)}
    return {"baseline": baseline, "spectral": "off", "balance_weight": 0.0}


def _block(groups: int, spectral: str, task_bias: bool = False) -> dict[str, Any]:
    adapter = {"r": 16, "lora_alpha": 32.0, "num_experts": 8, "num_groups": groups, "task_bias": task_bias}
    return {"adapter": adapter, "spectral": spectral, "spectral_weight": 1e-3}


# Equal parameters: of the backbone of hidden size 384 and 12 layers, 0.81 M.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA q,v": _lora(16, ["q_proj", "v_proj"]),
    "LoRA q,v, equal parameters": _lora(44, ["q_proj", "v_proj"]),
    "LoRA all": _lora(16, _ALL_LINEAR),
    "LoRA all, equal parameters": _lora(10, _ALL_LINEAR),
    "HydraLoRA q,v": {
        "baseline": {"method": "hydralora", "r": 16, "num_experts": 8, "target_modules": ["q_proj", "v_proj"]},
        "spectral": "off",
    },
    "block": _block(1, "off"),
    "block + spectral": _block(1, "pairwise"),
    "block + routing": _block(4, "off"),
    "block + both": _block(4, "pairwise"),
    "block + both + task bias": _block(4, "pairwise", task_bias=True),
}
_HEADS: dict[str, Any] = {"baseline": {"method": "heads"}, "spectral": "off", "balance_weight": 0.0}


@dataclass(frozen=True)
class Size:
    """How much of it is run. examples: training images of each task; test: test images of each."""

    counts: tuple[int, ...] = COUNTS
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = RATES
    maps: tuple[int, ...] = MAPS
    methods: tuple[str, ...] = tuple(METHODS)
    examples: int = 200
    test: int = 40
    epochs: int = 3


SMOKE = Size((2, 3), (0,), (7e-4,), (2,), ("LoRA q,v", "block + both + task bias"), examples=16, test=8, epochs=1)


class Claim:
    """The cells in their order: rates, then upper and lower bounds, then methods, and the conflict of label maps."""

    def __init__(self, out: Path, backbone: Path, size: Size, threads: int) -> None:
        self.out, self.backbone, self.size, self.threads = out, backbone, size, threads
        self.order = task_order(SUITE)[: max(size.counts)]
        self.results: list[dict[str, Any]] = []

    def config(self, method: dict[str, Any], rate: float, **changed: Any) -> TrainingConfig:
        """A cell's configuration."""
        return TrainingConfig.model_validate(
            {
                "suite": SUITE, "examples_per_task": self.size.examples, "validation_per_task": 0, "batch_size": 32,
                "epochs": self.size.epochs, "learning_rate": rate, "save_every": 100, "threads": self.threads,
                **method, **changed,
            }
        )  # fmt: skip

    def run(self) -> None:
        """Run what is not done, and write the report after each cell."""
        rates = {name: self._rate(name) for name in self.size.methods}
        for part, name, config in self._cells(rates):
            result = self._cell(part, name, config, "test")
            self.results.append({**result, "part": part, "name": name})
            write_claim(self.results, self.out)
        print((self.out / "claim.md").read_text(), end="")

    def _rate(self, name: str) -> float:
        """The rate that is best on validation images, told, with most tasks and the first seed."""
        tasks, seed = tuple(self.order), self.size.seeds[0]
        found = {}
        for rate in self.size.rates if len(self.size.rates) > 1 else ():
            config = self.config(METHODS[name], rate, tasks=tasks, seed=seed)
            found[rate] = self._cell(f"rates/{rate:g}", name, config, "validation")["mean_accuracy"]
        return max(found, key=found.__getitem__) if found else self.size.rates[0]

    def _cells(self, rates: dict[str, float]) -> Iterator[tuple[str, str, TrainingConfig]]:
        size = self.size
        whole = rates.get("block + both", next(iter(rates.values())))
        for seed in size.seeds:
            for task in self.order:
                yield "upper", UPPER, self.config(METHODS["block + both"], whole, tasks=(task,), seed=seed)
        # Most tasks first: they decide.
        for seed in size.seeds:
            for count in sorted(size.counts, reverse=True):
                tasks = tuple(self.order[:count])
                for part, heads in (("told", "own"), ("shared", "all classes")):
                    yield part, LOWER, self.config(_HEADS, rates[size.methods[0]], tasks=tasks, seed=seed, heads=heads)
                    for name in size.methods:
                        if part == "told" or "task bias" not in name:
                            yield (
                                part,
                                name,
                                self.config(METHODS[name], rates[name], tasks=tasks, seed=seed, heads=heads),
                            )
        for seed in size.seeds:
            for number in size.maps:
                for part, heads in ((f"maps-{number}-own", "own"), (f"maps-{number}-words", "label words")):
                    # As many images in all as with 25 tasks, whatever the number of maps.
                    maps = {
                        "suite": f"vision-maps-{number}", "seed": seed, "heads": heads,
                        "tasks": tuple(f"map-{i:03}" for i in range(number)),
                        "examples_per_task": max(16, size.examples * max(size.counts) // number),
                    }  # fmt: skip
                    yield part, LOWER, self.config(_HEADS, rates[size.methods[0]], **maps)
                    for name in size.methods:
                        yield part, name, self.config(METHODS[name], rates[name], **maps)

    def _cell(self, part: str, name: str, config: TrainingConfig, split: str) -> dict[str, Any]:
        tasks = config.tasks or ()
        where = name.replace(" ", "-").replace(",", "")
        folder = run_folder(
            self.out / part, f"{where}-{tasks[0]}" if part == "upper" else where, len(tasks), config.seed
        )
        run = Run(name, config, folder)
        settings = {"examples": self.size.test, "split": split}
        result = read_result(run, self.backbone, settings) or do(run, self.backbone, settings)
        if "error" in result:
            raise SystemExit(f"{folder}: {result['error']}")
        # The state has served; hundreds of them would fill a disk.
        (folder / "state.pt").unlink(missing_ok=True)
        print(json.dumps({"part": part, "name": name, "tasks": len(tasks), "seed": config.seed,
                          "rate": config.learning_rate, "accuracy": result["mean_accuracy"]}), flush=True)  # fmt: skip
        return result


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/claim"))
    parser.add_argument("--backbone", default="vision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="the same code, small: minutes")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of tasks; default: 5 10 15 20 25")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="default: all")
    parser.add_argument("--rates", type=float, nargs="+", help="default: 2e-4 7e-4 2e-3; one: no choice of rates")
    parser.add_argument("--maps", type=int, nargs="*", help="numbers of label maps; default: 4 16 64")
    parser.add_argument("--examples", type=int, help="training images of each task; default: 200")
    args = parser.parse_args()
    size = SMOKE if args.smoke else Size()
    chosen = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("seeds", "counts", "methods", "rates", "maps", "examples")
        if (value := getattr(args, name)) is not None
    }
    Claim(args.out, resolve(args.backbone), Size(**{**vars(size), **chosen}), args.threads).run()


if __name__ == "__main__":
    main()
