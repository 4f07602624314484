"""`make documents`: many tasks about one document, computed once, against each task by itself; the adapter's accuracy.

Documents and adapters are random, except for accuracy, because their content does not change a token's cost. Every
engine is a process that lives through the whole run, with a prefix cache. Rows take turns, and a ratio is the median of
the rounds.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.adapters import CONFIG, Slot, random_tasks, task_slots, write_random_adapter, write_random_pefts
from benchmarks.harness.environment import engine_environment, usable_cores
from benchmarks.harness.percentile import spread
from benchmarks.harness.versions import newest_version
from benchmarks.harness.worker import WorkerProcess
from mtlora.backbone import identify, resolve
from mtlora.cli.output import print_table
from mtlora.vllm_cpu.precision import engine_dtype
from mtlora.vllm_plugin.seams import ENVIRONMENT_SWITCH

TASKS, MANY_TASKS = 25, 1000
DOCUMENT_TOKENS, OWN_TOKENS, NEW_TOKENS = 1000, 24, 8
# Rounds that compare many tasks with few: their 2,000 requests take a minute or two.
MANY_ROUNDS = 2
# Length of the documents for the ratios with another tenant's traffic.
GUESSED_TOKENS = 200
BATCH = 64
# Tokens of other traffic between two calls about a document; more than the cache of one gibibyte holds.
FLOOD_TOKENS = 60_000
LEASE = (600.0, 8192)
_ENGINE = {
    "max_num_seqs": BATCH, "max_model_len": 2048, "max_num_batched_tokens": 2048, "enforce_eager": True,
    "enable_prefix_caching": True, "disable_log_stats": True, "seed": 0,
}  # fmt: skip


@dataclass
class Bench:
    """The engines, and random documents that are new to them."""

    ours: WorkerProcess
    stock: WorkerProcess | None
    activated: Sequence[Slot]
    every: Sequence[Slot]
    peft: Sequence[Slot]
    vocabulary: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def tokens(self, number: int) -> list[int]:
        """Random token ids."""
        return [self.rng.randrange(self.vocabulary) for _ in range(number)]

    def ask(
        self,
        worker: WorkerProcess,
        document: list[int],
        slots: Sequence[Slot],
        new_tokens: int = NEW_TOKENS,
        **more: Any,
    ) -> dict[str, Any]:
        """Send each slot's task about a document, all at once."""
        prompts = [[*document, *self.tokens(OWN_TOKENS)] for _ in slots]
        reply = worker.ask({"prompts": prompts, "new_tokens": new_tokens, "slots": slots, **more})
        if reply["tokens"] != len(slots) * new_tokens:
            raise RuntimeError(f"{reply['tokens']} tokens instead of {len(slots) * new_tokens}")
        return reply

    def shared(self, document: list[int], slots: Sequence[Slot], new_tokens: int = NEW_TOKENS, **more: Any) -> Any:
        """Like `ask`, for activated adapters, which act only after the document."""
        return self.ask(self.ours, document, slots, new_tokens, point=len(document), **more)


def main() -> int:
    """Run every row, print the ratios and the last line, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--adapter", type=Path, help="adapter to score; default: the newest of adapters/documents")
    parser.add_argument("--examples", type=int, default=10, help="documents for the accuracy; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tries", type=int, default=60, help="of the timing attack; default: %(default)s")
    parser.add_argument("--block-size", type=int, default=32, help="of the KV cache, in tokens; default: %(default)s")
    parser.add_argument("--skip-field", action="store_true", help="without vLLM's own multi-LoRA, which takes minutes")
    parser.add_argument("--skip-accuracy", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/documents"))
    args = parser.parse_args()
    adapter = None if args.skip_accuracy else args.adapter or newest_version(Path("adapters/documents"))
    folder = resolve(args.backbone)
    with ExitStack() as stack:
        report = measure(_start(stack, folder, args), args)
    accuracy = None if adapter is None else _accuracy(args.backbone, adapter, args.examples)
    report |= {"cores": len(usable_cores()), "made": time.strftime("%Y-%m-%d"), "accuracy": accuracy}
    if accuracy:
        report["accuracy_documents"] = args.examples
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "documents.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(
        f"{TASKS} tasks about a document of {DOCUMENT_TOKENS} tokens, {report['dtype']}",
        ("measure", "found", "from", "to", "goal"),
        [
            (name, *(f"{each[key]:.2f}" for key in ("median", "min", "max")), each["goal"])
            for name, each in report["rows"].items()
        ],
    )
    if accuracy:
        print(f"accuracy: {args.examples} documents, every task asked of each; its spread is that of the documents")
    print(last_line(report))
    return 0


def last_line(report: dict[str, Any]) -> str:
    """One line of results, without skipped ones."""
    rows, accuracy = report["rows"], report["accuracy"]
    parts = [f"{TASKS} tasks", f"shared/apart {rows['shared/apart']['median']:.1f}"]
    if "shared/vllm-multi-lora" in rows:
        parts.append(f"against vllm-multi-lora {rows['shared/vllm-multi-lora']['median']:.1f}")
    if accuracy:
        parts.append(f"accuracy {accuracy['adapter']:.2f}, backbone alone {accuracy['backbone_alone']:.2f}")
    return f"documents: {', '.join(parts)}"


def _start(stack: ExitStack, folder: Path, args: argparse.Namespace) -> Bench:
    temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    identity, config = identify(folder), json.loads((folder / "config.json").read_text())
    ids = iter(range(1, 100_000))

    def adapter(name: str, activation: str, number: int) -> list[Slot]:
        tasks = tuple(
            task.model_copy(update={"document_template": "{document}", "template": "?"})
            for task in random_tasks(number)
        )
        made = CONFIG.model_copy(update={"activation": activation})
        write_random_adapter(temporary / name, identity, tasks, seed=number, config=made)
        return task_slots(temporary / name, number, ids)

    def engine(environment: dict[str, str], **settings: Any) -> WorkerProcess:
        arguments = {
            "model": str(folder),
            "dtype": engine_dtype("auto", folder),
            **_ENGINE,
            "block_size": args.block_size,
            **settings,
        }
        return stack.enter_context(
            WorkerProcess("benchmarks.engine.worker", arguments, engine_environment() | environment)
        )

    peft: list[Slot] = []
    stock = None
    if not args.skip_field:
        peft = write_random_pefts(temporary, TASKS, config)
        stock = engine(
            {ENVIRONMENT_SWITCH: "0"}, enable_lora=True, max_loras=TASKS, max_cpu_loras=TASKS, max_lora_rank=16
        )
    ours = engine({}, enable_lora=True, max_loras=BATCH, max_cpu_loras=2048)
    return Bench(
        ours, stock, adapter("task", "task", MANY_TASKS), adapter("all", "all", TASKS), peft, config["vocab_size"]
    )


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of the report."""
    few, every = bench.activated[:TASKS], bench.every
    for worker, slots in ((bench.ours, [*few, *every]), (bench.stock, bench.peft)):
        if worker is not None:
            bench.ask(worker, bench.tokens(64), slots, 2, **({"point": 0} if worker is bench.ours else {}))
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        print(f"{name}: {value:.3f}", file=sys.stderr, flush=True)

    for number in range(args.rounds):
        shared = bench.shared(bench.tokens(DOCUMENT_TOKENS), few)
        apart = bench.ask(bench.ours, bench.tokens(DOCUMENT_TOKENS), every)
        note("shared/apart", apart["seconds"] / shared["seconds"])
        document = bench.tokens(DOCUMENT_TOKENS)
        first = bench.shared(document, few[:1], 1)
        cached = [bench.shared(document, [slot], 1)["seconds"] for slot in few[1:]]
        note("first token, cached/not", statistics.median(cached) / first["seconds"])
        note("a task of a cached document, s", statistics.median(cached))
        # Expected seconds of both sides: their computed tokens at the speed of one document, plus the same decoding.
        decoding = bench.shared(document, few)["seconds"] - bench.shared(document, few, 1)["seconds"]
        prompt = DOCUMENT_TOKENS + OWN_TOKENS
        per_token, prompts = first["seconds"] / prompt, TASKS * prompt
        predicted = (prompts * per_token + decoding) / ((prompts - shared["cached"]) * per_token + decoding)
        note("shared/apart, predicted", predicted)
        kept, again = ask_again(bench, few[:1])
        note("asked again beside other traffic, kept/not", again["seconds"] / kept["seconds"])
        note("the same: prompt tokens computed, kept", prompt - kept["cached"])
        note("the same: prompt tokens computed, not kept", prompt - again["cached"])
        if number < MANY_ROUNDS:
            note("1000 tasks/25 tasks", many_over_few(bench, number))
    if bench.stock is not None:
        shared = bench.shared(bench.tokens(DOCUMENT_TOKENS), few)
        theirs = bench.ask(bench.stock, bench.tokens(DOCUMENT_TOKENS), bench.peft)
        note("shared/vllm-multi-lora", theirs["seconds"] / shared["seconds"])
    for _ in range(args.tries):
        known, unknown = bench.tokens(GUESSED_TOKENS), bench.tokens(GUESSED_TOKENS)
        bench.shared(known, few[:1], 1, salt="victim")
        pair = [("known", known), ("unknown", unknown)]
        bench.rng.shuffle(pair)
        times = {name: bench.shared(document, few[:1], 1, salt="attacker")["seconds"] for name, document in pair}
        note("another tenant's document/unknown", times["known"] / times["unknown"])
    goals = {
        "shared/apart": ">= 8", "shared/vllm-multi-lora": ">= 25", "first token, cached/not": "<= 0.15",
        "1000 tasks/25 tasks": ">= 0.97", "another tenant's document/unknown": "1.00",
    }  # fmt: skip
    rows = {name: spread(each) | {"goal": goals.get(name, "")} for name, each in found.items()}
    return {"rows": rows, "dtype": engine_dtype("auto", resolve(args.backbone)).replace("auto", "bfloat16")}


def many_over_few(bench: Bench, number: int) -> float:
    """Answers a second, in 1,000 requests about one document: of 1,000 tasks ÷ of 25. The order follows `number`."""
    few = [*bench.activated[:TASKS]] * (MANY_TASKS // TASKS)
    seconds = {}
    for slots in (bench.activated, few)[:: -1 if number % 2 else 1]:
        seconds[slots is few] = bench.shared(bench.tokens(DOCUMENT_TOKENS), slots)["seconds"]
    return float(seconds[True] / seconds[False])


def ask_again(bench: Bench, slot: Sequence[Slot]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask a task about a kept document, then about one in the plain cache, both after other traffic."""
    documents = [bench.tokens(DOCUMENT_TOKENS) for _ in range(2)]
    leases: Sequence[dict[str, Any]] = [{"lease": LEASE}, {}]
    for document, lease in zip(documents, leases, strict=True):
        bench.shared(document, slot, 1, **lease)
    length = FLOOD_TOKENS // BATCH
    bench.ours.ask({"prompts": [bench.tokens(length) for _ in range(BATCH)], "new_tokens": 1, "slots": [None] * BATCH})
    kept, again = (bench.shared(document, slot, 1, **lease) for document, lease in zip(documents, leases, strict=True))
    return kept, again


def _accuracy(backbone: str, adapter: Path, examples: int) -> dict[str, float]:
    """Mean accuracy on fresh documents, of the adapter and of the backbone alone."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "accuracy.json"
        command = [
            sys.executable, "-m", "mtlora.cli", "eval", "--backbone", backbone, "--adapter", str(adapter), "--suite",
            "documents", "--examples", str(examples), "--seed", str(int(time.time())), "--json", str(out),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        found = json.loads(out.read_text())
    return {name: found[name]["mean_accuracy"] for name in ("adapter", "backbone_alone")}


if __name__ == "__main__":
    raise SystemExit(main())
