"""`make types`: typed answers, and labels scored without generation, on a real server.

One server serves the shipped adapter. Its 25 built-in tasks and the 27 of BIG-Bench Hard are asked

- at temperatures from 0 to 2, mixed: how many answers are not of their task's type;
- greedily, typed and free in turn, each round the same requests: throughput and accuracy of both;
- the tasks of labels: probabilities by `Score` and labels by `Generate` in turn; and how well the probabilities are
  calibrated, on test examples.

Then adapters with a schema of 50 fields are published, one after the other, and the first request to each is compared
with the second.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]

from benchmarks.harness.adapters import CONFIG, random_tensors
from benchmarks.harness.asking import closed_loop
from benchmarks.harness.native_server import native_server
from benchmarks.harness.processes import cpu_seconds, process_tree
from benchmarks.harness.versions import newest_version
from mtlora.answer import AnswerType, Date, Json, Label, Number, Regex, Text
from mtlora.backbone import identify, resolve
from mtlora.checkpoint.format import AdapterManifest, TaskEntry
from mtlora.checkpoint.read import read_manifest
from mtlora.checkpoint.write import write_checkpoint
from mtlora.cli.output import print_table
from mtlora.client import Answer, AsyncClient, Score
from mtlora.evaluation.calibration import error_by_chance, expected_calibration_error
from mtlora.suite import load_suite
from mtlora.suite.answers import BBH
from mtlora.suite.base import Example
from mtlora.task import is_correct
from server.cli.process import ServerProcess

# Requests in flight: in the parts that compare speeds, and in the others, which fill the engine.
IN_FLIGHT, FULL = 16, 64
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
# Each later part uses this share of the requests.
_SHARE_OF_PAIRS = 0.2
_ROUNDS = 4
_SCHEMAS = 5
# Examples per task for calibration; with fewer, the error is mostly chance.
_CALIBRATED = 40


@dataclass(frozen=True)
class Question:
    """An example of one of the 52 tasks; `task` names the suite too: both have seven of the ids."""

    task: str
    example: Example


def main() -> int:
    """Measure and print; 1 if an answer lies outside its type."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server.typed_answers")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="default: the highest version in adapters/builtin")
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--bbh", type=Path, default=Path("data/bbh"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="typed ones at all temperatures")
    args = parser.parse_args()
    adapter = args.adapter or newest_version(Path("adapters/builtin"))
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder)
        shutil.copytree(adapter, adapters / "builtin" / adapter.name)
        settings = {"backbone": args.backbone, "adapters": adapters, "max_num_seqs": 64, "max_model_len": 1024}
        with native_server(**settings) as server:
            outside = asyncio.run(measure(server, adapters, adapter, args))
    return 1 if outside else 0


async def measure(server: ServerProcess, adapters: Path, adapter: Path, args: argparse.Namespace) -> int:
    """All parts, and the line at the end; how many answers lie outside their types."""
    manifest = read_manifest(adapter)
    questions = list(_questions(args.bbh))
    tasks = list(dict.fromkeys(each.task for each in questions))
    began = [time.monotonic()]

    def took() -> str:
        began.append(time.monotonic())
        return f"{began[-1] - began[-2]:.0f} s"

    async with AsyncClient(server.address) as client:
        outside = await count_outside(client, manifest, questions, args.requests)
        parts = [f"typed answers {took()}"]
        pairs = max(len(tasks), int(args.requests * _SHARE_OF_PAIRS) // _ROUNDS)
        typed_by_free = await compare_with_free(client, server.process.pid, questions, pairs)
        parts.append(f"typed and free {took()}")
        score_by_generate = await compare_score(client, manifest, questions, pairs)
        parts.append(f"scores and labels {took()}")
        calibration = await measure_calibration(client, manifest, args.bbh)
        parts.append(f"calibration {took()}")
        await first_requests(client, adapters, args.backbone)
    print(f"parts: {', '.join(parts)}, schemas {took()}")
    print(
        f"types: {len(tasks)} tasks, {args.requests} requests, {outside} outside, typed/free {typed_by_free:.2f}, "
        f"score/generate {score_by_generate:.2f}, calibration {calibration:.3f}"
    )
    return outside


def _questions(bbh: Path) -> Iterator[Question]:
    """Test examples of the built-in tasks, and the validation and test inputs of BIG-Bench Hard's, shuffled."""
    found = []
    builtin = load_suite("builtin")
    for task in builtin.tasks:
        found += [Question(f"builtin {task.id}", each) for each in builtin.examples(task.id, "test", 40)]
    folder = load_suite(str(bbh))
    for task_id in BBH:
        unseen = [*folder.examples(task_id, "validation", None), *folder.examples(task_id, "test", None)]
        found += [Question(f"bbh {task_id}", each) for each in unseen]
    random.Random(0).shuffle(found)
    # Take one of each task in turn, so that any number of them is a mix.
    by_task: dict[str, list[Question]] = {}
    for each in found:
        by_task.setdefault(each.task, []).append(each)
    turns = itertools.zip_longest(*by_task.values())
    return (each for turn in turns for each in turn if each is not None)


def is_of_type(answer: AnswerType, text: str) -> bool:
    """Whether a text is an answer, checked by other code than the decoder's, except for grammars."""
    text = text.strip()
    try:
        match answer:
            case Label(labels=labels):
                return text in labels
            case Number(minimum=least, maximum=most, step=step):
                return least <= Decimal(text) <= most and not Decimal(text) % step
            case Date(format=format):
                return datetime.strptime(text, format).strftime(format) == text
            case Regex(pattern=pattern):
                return bool(re.fullmatch(pattern, text, re.ASCII))
            case Json(json_schema=schema):
                jsonschema.validate(json.loads(text, parse_constant=_refuse_constant), json.loads(schema))
                return True
            case Text(max_length=most):
                return 0 < len(text) <= (most or len(text)) and len(text.splitlines()) == 1
    except (ValueError, InvalidOperation, jsonschema.ValidationError):
        return False
    return answer.check(text)


def _refuse_constant(name: str) -> None:
    """Raise, because JSON has neither NaN nor Infinity."""
    raise ValueError(name)


async def count_outside(
    client: AsyncClient, manifest: AdapterManifest, questions: Sequence[Question], requests: int
) -> int:
    """Count and print answers that are not of their task's type."""
    outside = 0
    began = time.monotonic()

    async def ask(item: tuple[int, Question]) -> None:
        nonlocal outside
        number, question = item
        example = question.example
        temperature = TEMPERATURES[number % len(TEMPERATURES)]
        answer = await client.generate(example.task_id, example.input, temperature=temperature, seed=number)
        answer_type = manifest.task(example.task_id).answer_type
        assert answer_type is not None
        if not is_of_type(answer_type, answer.text):
            outside += 1
            print(f"outside: {question.task}, temperature {temperature}: {answer.text[:200]!r}", flush=True)

    # Send one question at several temperatures in a row, so that its prompt is in the cache.
    times = min(len(TEMPERATURES), max(1, requests // len(questions)))
    every = (each for each in itertools.cycle(questions) for _ in range(times))
    await closed_loop(enumerate(itertools.islice(every, requests)), FULL, ask)
    print(f"{requests} typed answers in {time.monotonic() - began:.0f} s, {outside} outside", flush=True)
    return outside


async def _timed(questions: Sequence[Question], ask: Callable[[Question], Awaitable[None]]) -> float:
    began = time.monotonic()
    await closed_loop(questions, IN_FLIGHT, ask)
    return time.monotonic() - began


def _processor_s(pid: int) -> float:
    """Processor time of a process and those below it."""
    return sum(cpu_seconds(each.pid) for each in process_tree(pid))


async def compare_with_free(client: AsyncClient, pid: int, questions: Sequence[Question], pairs: int) -> float:
    """Throughput typed ÷ free, greedily; prints accuracies, and the tasks that gain and lose.

    Also prints the ratio of processor times of the server's processes, which a busy machine disturbs less.
    """
    right: dict[bool, dict[str, list[bool]]] = {False: {}, True: {}}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    waiting = itertools.cycle(questions)
    for number in range(_ROUNDS):
        asked = list(itertools.islice(waiting, pairs))
        for free in (number % 2 == 0, number % 2 == 1):

            async def ask(question: Question, free: bool = free) -> None:
                answer: Answer = await client.generate(question.example.task_id, question.example.input, free=free)
                correct = is_correct(answer.text, question.example.target)
                right[free].setdefault(question.task, []).append(correct)

            before = _processor_s(pid)
            seconds[free].append(await _timed(asked, ask))
            processor[free].append(_processor_s(pid) - before)
    ratios = [free / typed for free, typed in zip(seconds[True], seconds[False], strict=True)]

    def accuracy(free: bool, suite: str) -> float:
        return statistics.mean(statistics.mean(each) for task, each in right[free].items() if task.startswith(suite))

    changed = [
        (task, f"{statistics.mean(right[True][task]):.3f}", f"{statistics.mean(each):.3f}", len(each))
        for task, each in sorted(right[False].items())
        if sum(each) != sum(right[True][task])
    ]
    print_table("tasks whose accuracy changes", ("task", "free", "typed", "examples"), changed)
    gained = sum(sum(each) > sum(right[True][task]) for task, each in right[False].items())
    print(f"tasks with types: {gained} gain, {len(changed) - gained} lose, {len(right[False]) - len(changed)} stay")
    for suite in ("builtin", "bbh"):
        without, with_types = accuracy(True, suite), accuracy(False, suite)
        ratio = with_types / without
        print(f"accuracy, {suite}: free {without:.4f}, typed {with_types:.4f}, typed/free {ratio:.4f}")
    print(f"throughput typed/free of {len(ratios)} rounds of {pairs}: {', '.join(f'{each:.3f}' for each in ratios)}")
    costs = [free / typed for free, typed in zip(processor[True], processor[False], strict=True)]
    print(f"requests a second of processor time, typed/free: {', '.join(f'{each:.3f}' for each in costs)}", flush=True)
    return statistics.geometric_mean(ratios)


def by_working(questions: Sequence[Question], labels: Mapping[str, bool]) -> dict[str, list[Question]]:
    """Questions of tasks of labels: of each task half among all mixed, the rest by whether the task has working.

    labels: whether the task has working, by task. No question occurs twice, because its prompt would be in the cache.
    """
    parts: dict[str, list[Question]] = {"mixed": [], "without working": [], "with working": []}
    seen: Counter[str] = Counter()
    for each in questions:
        if (worked := labels.get(each.example.task_id)) is not None:
            apart = "with working" if worked else "without working"
            parts[apart if seen[each.task] % 2 else "mixed"].append(each)
            seen[each.task] += 1
    return parts


async def compare_score(
    client: AsyncClient, manifest: AdapterManifest, questions: Sequence[Question], pairs: int
) -> float:
    """Requests a second of Score ÷ Generate, for all tasks of labels mixed; prints those with and without working too.

    Each question is sent in only one way, because the second time its prompt would be in the cache.
    """
    labels = {task.id: task.answer_marker is not None for task in manifest.tasks if task.labels}
    ratios: dict[str, list[float]] = {}
    for name, asked in by_working(questions, labels).items():
        each_way = min(pairs, len(asked) // (2 * _ROUNDS))
        waiting = iter(asked)
        for number in range(_ROUNDS):
            seconds = {}

            async def generate(question: Question) -> None:
                await client.generate(question.example.task_id, question.example.input)

            async def score(question: Question) -> None:
                await scored(client, question.example)

            for way in (generate, score) if number % 2 else (score, generate):
                seconds[way] = await _timed(list(itertools.islice(waiting, each_way)), way)
            ratios.setdefault(name, []).append(seconds[generate] / seconds[score])
        print(f"score/generate {name}, rounds of {each_way}: {', '.join(f'{each:.2f}' for each in ratios[name])}")
    means = {name: statistics.geometric_mean(each) for name, each in ratios.items()}
    worked = sum(labels.values())
    print(
        f"score/generate: {len(labels)} tasks of labels mixed {means['mixed']:.2f}, {len(labels) - worked} without "
        f"working {means['without working']:.2f}, {worked} with working {means['with working']:.2f}",
        flush=True,
    )
    return means["mixed"]


async def scored(client: AsyncClient, example: Example) -> Score:
    """One example's score. Raises ServerError."""
    (found,) = await client.score(example.task_id, [example.input])
    if found.error:
        raise found.error
    return found


async def measure_calibration(client: AsyncClient, manifest: AdapterManifest, bbh: Path) -> float:
    """The expected calibration error over test examples, generated ones and those of the files.

    Also prints the error that perfect probabilities would show on this number of examples.
    """
    labels = {task.id for task in manifest.tasks if task.labels}
    examples: list[Example] = []
    for name in ("builtin", "bbh-generated"):
        suite = load_suite(name)
        for task in suite.tasks:
            examples += suite.examples(task.id, "test", _CALIBRATED, 1) if task.id in labels else []
    folder = load_suite(str(bbh))
    for task_id in BBH.keys() & labels:
        examples += folder.examples(task_id, "test", None)[:_CALIBRATED]
    outcomes: list[tuple[float, bool]] = []

    async def ask(example: Example) -> None:
        found = await scored(client, example)
        outcomes.append((found.probabilities[found.label], is_correct(found.label, example.target)))

    await closed_loop(examples, FULL, ask)
    accuracy = statistics.mean(right for _, right in outcomes)
    error, by_chance = expected_calibration_error(outcomes), error_by_chance([each for each, _ in outcomes])
    print(
        f"calibration: {len(outcomes)} labels of {len(labels)} tasks, accuracy {accuracy:.3f}, expected calibration "
        f"error {error:.3f}; perfect probabilities would show {by_chance:.3f} on this many labels",
        flush=True,
    )
    return error


async def first_requests(client: AsyncClient, adapters: Path, backbone: str) -> None:
    """Publish adapters with a schema of 50 fields each; prints the first two requests to each, and how they differ."""
    identity = identify(resolve(backbone))
    made = Path(tempfile.mkdtemp(dir=adapters.parent))
    rows = []
    try:
        for number in range(_SCHEMAS):
            kinds = (
                {"type": "string", "maxLength": 12},
                {"type": "integer"},
                {"type": "boolean"},
                {"enum": ["a", "b"]},
            )
            names = [f"s{number}f{i}" for i in range(50)]
            properties = {name: kinds[i % len(kinds)] for i, name in enumerate(names)}
            schema = json.dumps({"type": "object", "properties": properties, "required": names})
            task = TaskEntry(
                id=f"schema-{number}", description="a schema of 50 fields", bias_index=0, max_new_tokens=400,
                answer=Json(json_schema=schema),
            )  # fmt: skip
            tensors = random_tensors(identity, CONFIG, [task], seed=number, scale=0.0)
            write_checkpoint(
                made / str(number), backbone=identity, config=CONFIG, tasks=(task,),
                tensors={name: tensor.half() for name, tensor in tensors.items()},
            )  # fmt: skip
            (adapters / f"schema-{number}").mkdir()
            (made / str(number)).rename(adapters / f"schema-{number}" / "1")
            await client.load_adapter(f"schema-{number}")
            seconds = []
            for text in ("One two three.", "Six five four."):
                began = time.monotonic()
                stream = client.stream(task.id, text)
                await anext(stream)
                seconds.append(time.monotonic() - began)
                await stream.aclose()
                # The engine notices the closed stream between steps.
                await asyncio.sleep(0.5)
            rows.append(
                (task.id, *(f"{1e3 * each:.0f} ms" for each in seconds), f"{1e3 * (seconds[0] - seconds[1]):.0f} ms")
            )
    finally:
        shutil.rmtree(made)
    title = "first token of a task just loaded, a schema of 50 fields (goal: slower by 20 ms at most)"
    print_table(title, ("task", "first request", "second", "slower by"), rows)


if __name__ == "__main__":
    raise SystemExit(main())
