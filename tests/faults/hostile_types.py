"""Types of answers made to be expensive: each gets an answer or a clear status, beside a neighbour who feels little."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial

from mtlora_pb.v1 import inference_pb2 as pb

from benchmarks.harness.adapters import write_random_adapter
from benchmarks.harness.asking import closed_loop, open_loop
from benchmarks.harness.percentile import p99
from benchmarks.harness.processes import resident_bytes
from benchmarks.harness.waiting import wait_until
from mtlora.backbone import identify, resolve
from mtlora.checkpoint.format import TaskEntry
from mtlora.client import Access, AsyncClient, Client, ServerError
from tests.faults._load import Question, p99_name, questions
from tests.faults._tenanted import has_task, tenanted
from tests.faults.scenario import Options, Row

ORDER = 56
# Allow 4: the other tenant takes half of the machine (2), and the checks one of two cores (2).
P99_GOAL = 4.0
MAX_GROWTH_BYTES = 256 << 20
_TASK = "hostile.free"
# Expensive ones in flight, in every other round; in the others, cheap ones a second that all differ.
_IN_FLIGHT, _DIFFERENT = 4, 200.0
# The neighbour's requests in a turn; in a round, a turn without the hostile tenant and one with it.
_PER_TURN, _MIN_ROUNDS, _TOKENS = 5, 4, 8
# The beginning of the neighbour's type, a regex.
NEIGHBOURS_TYPE = "[a-z]{1,12} "
# Tokens of the hostile tenant: most of its types are sampled to an end, far from the likeliest one.
_HOSTILE_TOKENS, _TEMPERATURE = 256, 2.0
_PROPER = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
_LOAD_TIMEOUT_S = 60.0


def run(options: Options) -> Row:
    """A tenant brings its own types to a task without one, while another asks one request after the other."""
    server = tenanted(options)
    access = server.set_tenants({"hostile": {}, "neighbour": {}})
    hidden, folder = server.root / ".hostile", server.root / "hostile"
    task = TaskEntry(id=_TASK, description="no type", template="{input}", bias_index=0, max_new_tokens=_TOKENS)
    write_random_adapter(hidden / "1", identify(resolve(options.backbone)), [task], seed=options.seed)
    hidden.rename(folder)
    round_s = 4 * _PER_TURN * _TOKENS * server.pace.step_s
    try:
        with Client(server.address, access["neighbour"]) as client:
            wait_until(lambda: has_task(client, _TASK), _LOAD_TIMEOUT_S, every_s=0.2)
            asked = [each for each in questions(client, 64, options.seed) if each.task_id != _TASK][:_PER_TURN]
        rounds = max(_MIN_ROUNDS, int((120.0 if options.full else 10.0) / round_s))
        hostility = Hostility(server.address, access, asked, options.seed, patience_s=server.pace.patience_s)
        asyncio.run(hostility.rounds(2))
        before = resident_bytes(server.server.process.pid)
        hostility.alone.clear()
        hostility.beside.clear()
        asyncio.run(hostility.rounds(rounds))
        grown = resident_bytes(server.server.process.pid) - before
    finally:
        folder.rename(options.folder / "removed")
    ratio, worst = p99(hostility.beside) / p99(hostility.alone), p99_name(hostility.beside)
    shown = ", ".join(f"{name} {n}" for name, n in hostility.statuses.most_common())
    return Row(
        "hostile types of answers",
        f"each an answer, INVALID_ARGUMENT or RESOURCE_EXHAUSTED, {MAX_GROWTH_BYTES >> 20} MiB of memory at most, no "
        f"request of a neighbour fails, and their {worst} <= {P99_GOAL} x alone",
        f"{hostility.statuses.total()} requests ({shown}), {grown / (1 << 20):.0f} MiB, neighbour "
        f"{len(hostility.beside)} requests, {hostility.failed} failed, {worst} {ratio:.2f} x "
        f"({1e3 * p99(hostility.alone):.0f} ms to {1e3 * p99(hostility.beside):.0f} ms)",
        met=set(hostility.statuses) <= _PROPER
        and hostility.statuses["OK"] > 0
        and not hostility.failed
        and grown <= MAX_GROWTH_BYTES
        and ratio <= P99_GOAL,
    )


class Hostility:
    """Turns of a neighbour's requests, without the hostile tenant and with it. alone, beside: seconds of each.

    failed: of the neighbour's. statuses: of the hostile tenant's.
    """

    def __init__(
        self, address: str, access: dict[str, Access], asked: list[Question], seed: int, *, patience_s: float
    ) -> None:
        self.alone: list[float] = []
        self.beside: list[float] = []
        self.failed = 0
        self.statuses: Counter[str] = Counter()
        self._over = False
        self._address, self._access, self._asked, self._patience_s = address, access, asked, patience_s
        self._expensive = _expensive(random.Random(seed))
        self._different = itertools.count()
        self._turns = itertools.count()

    async def rounds(self, number: int) -> None:
        async with (
            AsyncClient(self._address, self._access["neighbour"], retry=None) as neighbour,
            AsyncClient(self._address, self._access["hostile"], retry=None) as hostile,
        ):
            attack = partial(self._attack, hostile)
            for index in range(number):
                await self._turn(neighbour, self.alone)
                if index % 2:
                    different = (pb.AnswerType(regex=f"[0-9]{{3}}-{i}") for i in self._different)
                    loop = open_loop(self._while_on(different), itertools.repeat(1 / _DIFFERENT), attack)
                else:
                    loop = closed_loop(self._while_on(self._expensive), _IN_FLIGHT, attack)
                running = asyncio.create_task(loop)
                await self._turn(neighbour, self.beside)
                # What runs gets its answer, or no answer in time: types that never do are counted too.
                self._over = True
                await running
                self._over = False

    def _while_on(self, types: Iterator[pb.AnswerType]) -> Iterator[pb.AnswerType]:
        """Send types until the turn is over."""
        while not self._over:
            yield next(types)

    async def _turn(self, client: AsyncClient, into: list[float]) -> None:
        # New in each turn, so its first request waits for a check.
        answer = pb.AnswerType(regex=f"{NEIGHBOURS_TYPE}{next(self._turns)}")
        for question in self._asked:
            began = time.monotonic()
            try:
                await client.generate(_TASK, question.text, max_new_tokens=_TOKENS, answer=answer)
            except ServerError:
                self.failed += 1
            into.append(time.monotonic() - began)

    async def _attack(self, client: AsyncClient, answer: pb.AnswerType) -> None:
        try:
            await client.generate(
                _TASK,
                "x",
                answer=answer,
                max_new_tokens=_HOSTILE_TOKENS,
                temperature=_TEMPERATURE,
                seed=0,
                timeout=self._patience_s,
            )
            self.statuses["OK"] += 1
        except ServerError as error:
            self.statuses[error.code.name] += 1


def _expensive(rng: random.Random) -> Iterator[pb.AnswerType]:
    """Types that explode, are large, are recursive or invalid; all are different."""
    # More than a message may hold.
    too_many = pb.AnswerType(label=pb.LabelType(labels=[str(i) for i in range(100_000)]))
    while True:
        n = rng.randrange(1, 1 << 30)
        yield pb.AnswerType(regex=f"(a{{1000}}){{1000}}{n}")
        yield pb.AnswerType(regex=f"(.*a.{{12}}|.*b.{{11}}){n}")
        # Hundreds of states at every byte, each time others: in Python's automaton, and in llguidance's lexer.
        yield pb.AnswerType(regex=f".*a.{{60}}{n}")
        yield pb.AnswerType(regex=f"(.*a.{{200}}|.*b.{{199}}){n}")
        # No first mask within llguidance's limits.
        yield pb.AnswerType(regex=f"(.{{0,9}}[a-m]){{0,10}}{n}")
        yield pb.AnswerType(regex=f"([a-z]{{1,60}}-){{1,60}}{n}")
        fields = {f"f{i}": {"const": 1} for i in range(3000)}
        yield pb.AnswerType(json=json.dumps({"type": "object", "title": str(n), "properties": fields}))
        few = {f"f{i}": {"type": "string", "maxLength": 40} for i in range(150)}
        yield pb.AnswerType(json=json.dumps({"type": "object", "title": str(n), "properties": few}))
        yield pb.AnswerType(json='{"a":' * 10_000)
        yield pb.AnswerType(grammar=f'root ::= "{n}" root?')
        yield pb.AnswerType(
            grammar="\n".join(
                [f'root ::= r0 "{n}"', *(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40)), 'r40 ::= "a"']
            )
        )
        yield pb.AnswerType(label=pb.LabelType(labels=[str(n + i) for i in range(5_000)]))
        yield too_many
        yield pb.AnswerType(label=pb.LabelType(labels=[f"{n}-{i}" for i in range(1_000)]))
