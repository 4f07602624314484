"""The claim's cells: each is one run of a sweep, with a folder for its result."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.claim.cells import LOWER, UPPER
from benchmarks.claim.decisions import COLLAPSING, DECIDING, MAP_METHODS, MAPS, TOLD
from benchmarks.claim.methods import BOUNDS, DECISIVE, METHODS
from benchmarks.claim.report import write_claim
from mtlora.suite.vision.maps import PREFIX
from mtlora.sweep.grid import Run, do, read_result, run_folder, task_order
from mtlora.train.config import TrainingConfig

SUITE = "builtin-vision"
COUNTS, SEEDS, RATES = (5, 10, 15, 20, 25), (0, 1, 2), (2e-4, 7e-4, 2e-3)
BATCH = 32
# Linear heads are fitted without steps.
_NO_RATE = 7e-4
# The upper bound's rate is chosen on this many single tasks.
_SINGLE = 5
# Part, name and configuration of a run.
Cell = tuple[str, str, TrainingConfig]


@dataclass(frozen=True)
class Size:
    """How much of the claim is run. examples: training images of each task, and pictures of all label maps; test: test
    images of each task; map_test: test pictures of all label maps; steps: optimizer steps of every cell; single_steps:
    those of the upper bound's cells, which have one task each.
    """

    counts: tuple[int, ...] = COUNTS
    seeds: tuple[int, ...] = SEEDS
    rates: tuple[float, ...] = RATES
    maps: tuple[int, ...] = MAPS
    methods: tuple[str, ...] = tuple(METHODS)
    # Use only full batches, so that every step of every cell has the same number of images.
    examples: int = 6 * BATCH
    test: int = 80
    map_test: int = 200
    steps: int = 360
    single_steps: int = 120


SMOKE = Size((2, 3), (0,), (7e-4,), (2,), (COLLAPSING, TOLD), examples=16, test=8, map_test=20, steps=2, single_steps=2)


class Claim:
    """The cells in order: for each seed the decisive ones, then the others. Each half first chooses rates."""

    def __init__(
        self,
        out: Path,
        backbone: Path,
        size: Size,
        jobs: int,
        *,
        train: bool = True,
        chosen: Mapping[str, float] | None = None,
    ) -> None:
        """chosen: learning rates of methods that need no trials."""
        self.out, self.backbone, self.size, self.jobs, self.train = out, backbone, size, jobs, train
        self.order = task_order(SUITE)
        self._rates: dict[str, float] = {LOWER: _NO_RATE, **(chosen or {})}

    def config(self, name: str, rate: float, tasks: Sequence[str], **changed: Any) -> TrainingConfig:
        """A cell's configuration. A second cell gains more than a second thread, because steps are small."""
        size = self.size
        steps = size.single_steps if name == UPPER else size.steps
        return TrainingConfig.model_validate(
            {
                "suite": SUITE, "tasks": tuple(tasks), "examples_per_task": size.examples, "validation_per_task": 0,
                "batch_size": BATCH, "epochs": math.ceil(steps / math.ceil(size.examples * len(tasks) / BATCH)),
                "max_steps": steps, "learning_rate": rate, "save_every": 100, "threads": 1,
                **(METHODS | BOUNDS)[name], **changed,
            }
        )  # fmt: skip

    def run(self) -> None:
        """Run missing cells, unless `train` is off, and write the report after each cell."""
        results: list[dict[str, Any]] = []
        diverged: list[str] = []
        for decisive in (True, False):
            self._choose(dict.fromkeys(name for _, name, _ in self.cells(lambda _: _NO_RATE, decisive)))
            cells = [cell for cell in self.cells(self._rate, decisive) if cell[1] in self._rates]
            # Sort results in the order of the cells.
            found: dict[int, dict[str, Any]] = {}
            for place, result in self._results(cells, "test"):
                part, name, config = cells[place]
                if "error" in result:
                    cell = f"{part}, {name}, {result['num_tasks']} tasks, seed {config.seed}"
                    diverged.append(f"{cell}: diverged, {result['error']}")
                else:
                    found[place] = {**result, "part": part, "name": name}
                if self.train:
                    write_claim(results + [found[place] for place in sorted(found)], diverged, self.out)
            results += [found[place] for place in sorted(found)]
        write_claim(results, diverged, self.out)
        print((self.out / "claim.md").read_text(), end="")

    def _rate(self, name: str) -> float:
        return self._rates.get(name, _NO_RATE)

    def _choose(self, names: Iterable[str]) -> None:
        """Choose each method's learning rate by accuracy on validation images; a diverged run has accuracy 0.

        Without training, a method with a missing trial gets no rate.
        """
        rates = self.size.rates
        new = [name for name in names if name not in self._rates]
        if len(rates) == 1:
            self._rates |= dict.fromkeys(new, rates[0])
            return
        cells = [("rates", name, config) for name in new for rate in rates for config in self.trials(name, rate)]
        judged: dict[tuple[str, float], list[float]] = {}
        for place, result in self._results(cells, "validation"):
            _, name, config = cells[place]
            judged.setdefault((name, config.learning_rate), []).append(result.get("mean_accuracy", 0.0))
        for name in new:
            if all(len(judged.get((name, rate), ())) == len(self.trials(name, rate)) for rate in rates):
                self._rates[name] = max(rates, key=lambda rate: fmean(judged[name, rate]))

    def trials(self, name: str, rate: float) -> list[TrainingConfig]:
        """The runs that decide a learning rate. They do not depend on other runs."""
        seed, tasks = SEEDS[0], self.order[: max(COUNTS)]
        groups = [[task] for task in tasks[:_SINGLE]] if name == UPPER else [tasks]
        return [self.config(name, rate, group, seed=seed) for group in groups]

    def cells(self, rate_of: Callable[[str], float], decisive: bool) -> Iterator[Cell]:
        """All deciding cells, or all other cells."""
        for seed in self.size.seeds:
            if decisive:
                for task in self.order[: max(self.size.counts)]:
                    yield "upper", UPPER, self.config(UPPER, rate_of(UPPER), [task], seed=seed)
            for count in sorted(self.size.counts, reverse=True):
                for part, heads in (("shared", "all classes"), ("told", "own")):
                    for name in (LOWER, *self.size.methods):
                        decides = count in DECIDING and name in (LOWER, *DECISIVE)
                        if decides == decisive and not (part == "shared" and name == TOLD):
                            tasks = self.order[:count]
                            yield part, name, self.config(name, rate_of(name), tasks, seed=seed, heads=heads)
            if decisive:
                yield from self._map_cells(seed, rate_of)

    def _map_cells(self, seed: int, rate_of: Callable[[str], float]) -> Iterator[Cell]:
        for number in self.size.maps:
            tasks = [f"map-{i:03}" for i in range(number)]
            for part, heads in ((f"maps-{number}-words", "label words"), (f"maps-{number}-own", "own")):
                for name in (LOWER, *(name for name in self.size.methods if name in MAP_METHODS)):
                    changed = {"suite": f"{PREFIX}{number}", "seed": seed, "heads": heads}
                    yield part, name, self.config(name, rate_of(name), tasks, **changed)

    def run_of(self, part: str, name: str, config: TrainingConfig) -> Run:
        """A cell's run. Its folder names its rate: another choice of rates leaves its result alone."""
        tasks = config.tasks or ()
        where = f"{name.replace(' ', '-').replace(',', '')}-{config.learning_rate:g}"
        if len(tasks) == 1:
            where += f"-{tasks[0]}"
        return Run(name, config, run_folder(self.out / part, where, len(tasks), config.seed))

    def _results(self, cells: Sequence[Cell], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield each cell's index and result when it ends; `jobs` run at a time. Raises SystemExit for errors."""
        todo = []
        for place, cell in enumerate(cells):
            if result := self._read(*cell, split):
                yield place, result
            elif self.train:
                todo.append(place)
        # A thread only waits: every run is a process.
        pool = ThreadPoolExecutor(self.jobs)
        try:
            going = {pool.submit(self._do, *cells[place], split): place for place in todo}
            for ended in as_completed(going):
                yield going[ended], ended.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _do(self, part: str, name: str, config: TrainingConfig, split: str) -> dict[str, Any]:
        """Run a cell; returns its result, or the error if it diverged. Raises SystemExit for other errors."""
        run = self.run_of(part, name, config)
        result = do(run, self.backbone, self._settings(part, split))
        if "error" in result and "diverged" not in result:
            raise SystemExit(f"{run.folder}: {result['error']}")
        # Remove the state, which is no longer needed; hundreds of states would fill a disk.
        (run.folder / "state.pt").unlink(missing_ok=True)
        about = {"part": part, "name": name, "tasks": run.num_tasks, "seed": config.seed, "rate": config.learning_rate}
        print(json.dumps({**about, "accuracy": result.get("mean_accuracy")}), flush=True)
        return result

    def _read(self, part: str, name: str, config: TrainingConfig, split: str) -> dict[str, Any] | None:
        run, settings = self.run_of(part, name, config), self._settings(part, split)
        return read_result(run, self.backbone, settings, diverged=True)

    def _settings(self, part: str, split: str) -> dict[str, Any]:
        """The settings that a cell is scored with."""
        return {"examples": self.size.map_test if part.startswith("maps-") else self.size.test, "split": split}
