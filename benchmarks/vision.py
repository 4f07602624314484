"""`make bench-vision`: images a second of a vision engine with adapters, against the bare backbone and the field.

Every system is a process that lives through the whole run. Cases take turns, so that other load on the machine affects
all of them alike. A ratio is the median of the rounds' ratios; over batch sizes, the lowest counts.
"""

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness.adapters import random_image_tasks, write_random_adapter
from benchmarks.harness.environment import engine_environment, usable_cores
from benchmarks.harness.worker import WorkerProcess
from mtlora.backbone import BackboneError, identify, packaged, resolve
from mtlora.cli.output import print_table

BATCHES = (1, 4, 16, 64)
# The batch in which other systems run.
FIELD_BATCH = 16
_SLOTS = 64
_TASKS = 25


@dataclass(frozen=True)
class Case:
    """One system at one batch size. slots: those of the images, in turn."""

    name: str
    worker: WorkerProcess
    batch: int
    slots: Sequence[Any] = ()

    def seconds(self, images: int, size: int) -> float:
        """Seconds for so many images."""
        message = {"images": images, "size": size, "batch": self.batch, "slots": list(self.slots)}
        reply = self.worker.ask(message)
        if reply["features"] != images:
            raise RuntimeError(f"{self.name}: {reply['features']} features of {images} images")
        return float(reply["seconds"])


@dataclass(frozen=True)
class Ratio:
    """Images a second of one system over those of another, its goal, and the batch sizes that it is taken at."""

    name: str
    over: str
    under: str
    goal: float
    batches: tuple[int, ...] = BATCHES


RATIOS = (
    Ratio("25 tasks/bare", "25 tasks", "bare", 0.97),
    Ratio("25 adapters/bare", "25 adapters", "bare", 0.90),
    Ratio("bare/hf", "bare", "hf", 1.0, (FIELD_BATCH,)),
    Ratio("bare/onnx", "bare", "onnx", 1.0, (FIELD_BATCH,)),
)


def main() -> int:
    """Run every case in turn in several rounds. Print rows and ratios, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vision", metavar="B", help="'vision' or a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=128, help="in a round, for each system and batch; default: 128")
    parser.add_argument("--size", type=int, default=112, help="pixels; default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of all systems")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    folder = resolve(args.backbone)
    # That file is in float32.
    onnx = args.backbone == "vision" and args.dtype == "float32"
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = _cases(stack, folder, temporary, args.size, args.dtype, onnx=onnx)
        seconds = _run(cases, args.images, args.size, args.rounds)
    report = make_report(args.images, seconds) | {"size": args.size, "made": time.strftime("%Y-%m-%d")}
    report |= {"cores": len(usable_cores()), "backbone": folder.name, "dtype": args.dtype}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "vision.json").write_text(json.dumps(report, indent=1) + "\n")
    _print(report)
    return 0


def _cases(stack: ExitStack, folder: Path, temporary: Path, size: int, dtype: str, *, onnx: bool) -> list[Case]:
    identity = identify(folder)
    ids = iter(range(1, 1000))

    def adapter(name: str, tasks: int, seed: int) -> list[tuple[str, int, str]]:
        """A random adapter's slots."""
        table = random_image_tasks(tasks, size=size)
        write_random_adapter(temporary / name, identity, table, seed=seed)
        return [(f"{name}#{task.id}", next(ids), f"{temporary / name}#{task.id}") for task in table]

    def worker(kind: str, **settings: Any) -> WorkerProcess:
        settings = {"model": str(folder), "kind": kind, "dtype": dtype, **settings}
        return stack.enter_context(WorkerProcess("benchmarks.vision_worker", settings, engine_environment()))

    def engine(**arguments: Any) -> WorkerProcess:
        return worker("engine", arguments={"enforce_eager": True, "disable_log_stats": True, "seed": 0, **arguments})

    one = adapter("one", _TASKS, 1)
    several = [slot for i in range(_TASKS) for slot in adapter(f"several-{i}", 1, 100 + i)]
    bare, routed = engine(), engine(enable_lora=True, max_loras=_SLOTS, max_cpu_loras=_SLOTS)
    cases = []
    for batch in BATCHES:
        cases.append(Case("bare", bare, batch))
        cases += [Case("25 tasks", routed, batch, one), Case("25 adapters", routed, batch, several)]
    cases.append(Case("hf", worker("transformers"), FIELD_BATCH))
    if onnx and importlib.util.find_spec("onnxruntime"):
        source = packaged("vision")
        assert source is not None
        try:
            file = source.source()
        except BackboneError as error:
            print(f"ONNX Runtime is left out: {error}")
        else:
            session = worker("onnx", file=str(file), threads=len(usable_cores()))
            cases.append(Case("onnx", session, FIELD_BATCH))
    elif onnx:
        print("ONNX Runtime is left out: onnxruntime is not installed.")
    return cases


def _run(cases: Sequence[Case], images: int, size: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of every round, by system and batch."""
    for case in cases:
        case.seconds(2 * case.batch, size)
    seconds: dict[str, dict[int, list[float]]] = {}
    with tqdm(total=rounds * len(cases), unit="case", desc="bench-vision") as bar:
        for round_number in range(rounds):
            # Systems of one batch size beside each other: a ratio's two measurements are close in time.
            for batch in BATCHES:
                turn = [case for case in cases if case.batch == batch]
                random.Random(round_number).shuffle(turn)
                for case in turn:
                    bar.set_postfix_str(f"{case.name}, batches of {batch}")
                    seconds.setdefault(case.name, {}).setdefault(batch, []).append(case.seconds(images, size))
                    bar.update()
    return seconds


def make_report(images: int, seconds: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, Any]:
    """Rows and ratios of a run. seconds: of every round, by system and batch."""
    rows = [
        {"system": name, "batch": batch, "images_per_second": _spread([images / each for each in values])}
        for name, batches in seconds.items()
        for batch, values in batches.items()
    ]
    ratios = {}
    for ratio in RATIOS:
        if ratio.over not in seconds or ratio.under not in seconds:
            continue
        by_batch = {
            batch: _spread(
                [b / a for a, b in zip(seconds[ratio.over][batch], seconds[ratio.under][batch], strict=True)]
            )
            for batch in ratio.batches
        }
        lowest = min(each["median"] for each in by_batch.values())
        ratios[ratio.name] = {"goal": ratio.goal, "lowest": lowest, "by_batch": by_batch}
    return {"images": images, "rows": rows, "ratios": ratios}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _print(report: Mapping[str, Any]) -> None:
    rows = []
    for row in report["rows"]:
        rate = row["images_per_second"]
        rows.append((row["system"], row["batch"], *(f"{rate[key]:.1f}" for key in ("median", "min", "max"))))
    title = f"{report['backbone']}, {report['size']} px, {report['dtype']} on {report['cores']} cores"
    print_table(title, ("system", "batch", "images/s, median", "min", "max"), rows)
    for name, ratio in report["ratios"].items():
        each = ", ".join(f"{batch}: {spread['median']:.2f}" for batch, spread in ratio["by_batch"].items())
        print(f"{name} by batch size: {each} (goal {ratio['goal']:.2f})")
    print("bench-vision: " + ", ".join(f"{name} {ratio['lowest']:.2f}" for name, ratio in report["ratios"].items()))


if __name__ == "__main__":
    raise SystemExit(main())
