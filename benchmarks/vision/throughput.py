"""`make bench-vision`: images a second of a vision engine with adapters, against the bare backbone and the field.

Every system is a process that runs during the whole benchmark. Cases take turns, so that other load on the machine
affects all of them alike. Further tables compare JPEGs through a server with the engine in process, and texts with and
without images on one server.
"""

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness.adapters import CONFIG, Slot, random_image_tasks, task_slots, write_random_adapter
from benchmarks.harness.environment import engine_environment, usable_cores
from benchmarks.harness.processes import halted
from benchmarks.harness.worker import WorkerProcess
from benchmarks.vision.report import Ratio, make_report, print_report
from benchmarks.vision.serving import TASKS, Served, image_server, photographs, print_front, tensors, text_beside_images
from mtlora.backbone import identify, packaged, resolve
from mtlora.config import MtLoRAConfig
from mtlora.errors import BackboneError
from server.cli.process import ServerProcess

BATCHES = (1, 4, 16, 64)
# The batch in which other systems run.
FIELD_BATCH = 16
# Distinct images that a server is asked about.
NUM_CONTENTS = 16
_SLOTS = 128


@dataclass(frozen=True)
class Case:
    """One system at one batch size. slots: those of the images, in turn. beside: processes halted meanwhile."""

    name: str
    worker: WorkerProcess
    batch: int
    slots: Sequence[Any] = ()
    beside: Sequence[int] = ()

    def seconds(self, images: int, size: int) -> float:
        """Seconds that `images` images take."""
        message = {"images": images, "size": size, "batch": self.batch, "slots": list(self.slots)}
        with ExitStack() as stack:
            for process in self.beside:
                stack.enter_context(halted(process))
            reply = self.worker.ask(message)
        if reply["features"] != images:
            raise RuntimeError(f"{self.name}: {reply['features']} features of {images} images")
        return float(reply["seconds"])


RATIOS = (
    Ratio("25 tasks/bare", "25 tasks", "bare", 0.97, BATCHES),
    Ratio("25 tasks half frozen/bare", "25 tasks half frozen", "bare", 0.97, BATCHES),
    Ratio("25 tasks both blocks/bare", "25 tasks both blocks", "bare", 0.97, BATCHES),
    Ratio("25 adapters/bare", "25 adapters", "bare", 0.90, BATCHES),
    Ratio("bare/hf", "bare", "hf", 1.0, (FIELD_BATCH,)),
    Ratio("bare/onnx", "bare", "onnx", 1.0, (FIELD_BATCH,)),
)
# Calls of one image in flight, and the ratios that the server must reach.
IN_FLIGHT = (16, 64)
TWO_ENGINES = ", two engines"
THROUGH_GRPC = tuple(
    Ratio(f"{contents} through gRPC{engines}/in process", f"gRPC, {contents}{engines}", "25 tasks", 0.90, IN_FLIGHT)
    for engines in ("", TWO_ENGINES)
    for contents in ("JPEGs", "tensors")
)


def main() -> int:
    """Run every case in turn in several rounds. Print rows and ratios, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vision", metavar="B", help="'vision' or a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=128, help="in a round, for each system and batch; default: 128")
    parser.add_argument("--size", type=int, default=112, help="pixels; default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of all systems")
    parser.add_argument("--skip-grpc", action="store_true", help="no JPEGs through a server")
    parser.add_argument("--skip-text", action="store_true", help="no texts beside images")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    folder = resolve(args.backbone)
    # The ONNX file is in float32.
    onnx = args.backbone == "vision" and args.dtype == "float32"
    title = f"{folder.name}, {args.size} px, {args.dtype} on {len(usable_cores())} cores"
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = _cases(stack, folder, temporary, args.size, args.dtype, onnx=onnx)
        report = make_report(args.images, _run(cases, args.images, args.size, args.rounds), RATIOS)
        print_report(report, title)
        if not args.skip_grpc:
            in_process = [case for case in cases if case.name == "25 tasks" and case.batch in IN_FLIGHT]
            servers = {
                name: stack.enter_context(
                    image_server(folder, temporary / f"served-{engines}", args.size, args.dtype, engines=engines)
                )
                for name, engines in {"": 1, TWO_ENGINES: 2}.items()
            }
            report["through_grpc"] = _through_grpc(servers, in_process, args.images, args.size, args.rounds, title)
    if not args.skip_text:
        with tempfile.TemporaryDirectory() as other:
            report["text_beside_images"] = text_beside_images(
                resolve("default"), folder, Path(other), args.size, args.dtype, args.rounds
            )
    report |= {"size": args.size, "made": time.strftime("%Y-%m-%d"), "cores": len(usable_cores())}
    report |= {"backbone": folder.name, "dtype": args.dtype}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "vision.json").write_text(json.dumps(report, indent=1) + "\n")
    print(last_line(report))
    return 0


def last_line(report: Mapping[str, Any]) -> str:
    """The summary for programs: the engines' ratios."""
    return "bench-vision: " + ", ".join(f"{name} {found['lowest']:.2f}" for name, found in report["ratios"].items())


def _cases(stack: ExitStack, folder: Path, temporary: Path, size: int, dtype: str, *, onnx: bool) -> list[Case]:
    identity = identify(folder)
    ids = iter(range(1, 1000))

    def adapter(
        name: str, tasks: int, seed: int, frozen: Iterable[int] = (), config: MtLoRAConfig = CONFIG
    ) -> list[Slot]:
        """A random adapter's slots."""
        written = random_image_tasks(tasks, size=size)
        write_random_adapter(temporary / name, identity, written, seed=seed, config=config, frozen=frozen)
        return task_slots(temporary / name, tasks, ids)

    def worker(kind: str, **settings: Any) -> WorkerProcess:
        settings = {"model": str(folder), "kind": kind, "dtype": dtype, **settings}
        return stack.enter_context(WorkerProcess("benchmarks.vision.worker", settings, engine_environment()))

    def engine(**arguments: Any) -> WorkerProcess:
        return worker("engine", arguments={"enforce_eager": True, "disable_log_stats": True, "seed": 0, **arguments})

    one = adapter("one", TASKS, 1)
    # As configs/images-light.json makes one.
    half = adapter("half", TASKS, 2, frozen=range(identity.num_layers // 2))
    # As `mtlora train` makes an adapter of images by default.
    both = adapter("both", TASKS, 3, config=CONFIG.model_copy(update={"blocks": "both"}))
    several = [slot for i in range(TASKS) for slot in adapter(f"several-{i}", 1, 100 + i)]
    bare, routed = engine(), engine(enable_lora=True, max_loras=_SLOTS, max_cpu_loras=_SLOTS)
    cases = []
    for batch in BATCHES:
        cases.append(Case("bare", bare, batch))
        cases += [Case("25 tasks", routed, batch, one), Case("25 tasks half frozen", routed, batch, half)]
        cases += [Case("25 tasks both blocks", routed, batch, both), Case("25 adapters", routed, batch, several)]
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


def _through_grpc(
    servers: Mapping[str, ServerProcess], in_process: Sequence[Case], images: int, size: int, rounds: int, title: str
) -> dict[str, Any]:
    """Calls with JPEGs, and with decoded tensors, in turn with the engine in process; prints a table."""
    contents = {"gRPC, JPEGs": photographs(NUM_CONTENTS), "gRPC, tensors": tensors(NUM_CONTENTS, size)}
    served = [
        Served(f"{name}{engines}", server, batch, each)
        for batch in IN_FLIGHT
        for engines, server in servers.items()
        for name, each in contents.items()
    ]
    beside = [server.process.pid for server in servers.values()]
    cases: list[Case | Served] = [*served, *(replace(case, beside=beside) for case in in_process)]
    report = make_report(images, _run(cases, images, size, rounds), THROUGH_GRPC)
    print_report(report, f"through gRPC: {title}", "in flight")
    print_front(served)
    return report


def _run(cases: Sequence[Case | Served], images: int, size: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of every round, by system and batch."""
    for case in cases:
        case.seconds(2 * case.batch, size)
    seconds: dict[str, dict[int, list[float]]] = {}
    with tqdm(total=rounds * len(cases), unit="case", desc="bench-vision") as bar:
        for round_number in range(rounds):
            # Run systems of one batch size one after the other, so that a ratio's two measurements are close in time.
            for batch in sorted({case.batch for case in cases}):
                turn = [case for case in cases if case.batch == batch]
                random.Random(round_number).shuffle(turn)
                for case in turn:
                    bar.set_postfix_str(f"{case.name}, batches of {batch}")
                    seconds.setdefault(case.name, {}).setdefault(batch, []).append(case.seconds(images, size))
                    bar.update()
    return seconds


if __name__ == "__main__":
    raise SystemExit(main())
