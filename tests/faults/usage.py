"""`kill -9` of the server under load: afterwards its usage equals the sum of the clients' summaries.

Exact means: a call whose summary came is counted once, with its tokens; a call that the kill left without a summary is
counted once or not at all.
"""

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb

from benchmarks.harness.native_server import native_server
from benchmarks.harness.tenants import tenant, write_tenants
from mtlora.client import Access, AsyncClient, ServerError
from server.accounting import Usage
from server.telemetry.metrics import Metrics
from tests.faults._load import PARAMETERS, Question, questions
from tests.faults._server import SETTINGS
from tests.faults.scenario import Options, Row

ORDER = 90
_TENANTS = 16
# Answers of every tenant before a kill.
_ANSWERS = 3
_NAMES = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass
class Asking:
    """One tenant, which asks the same question again and again, one call at a time."""

    access: Access
    question: Question
    summaries: list[pb.Summary] = field(default_factory=list)
    # Calls without a summary because of a kill, and for other reasons.
    unanswered: int = 0
    failures: list[str] = field(default_factory=list)

    async def ask(self, address: str, until_killed: asyncio.Event) -> None:
        """Ask by turns for a whole answer and for a stream, until the server is killed."""
        async with AsyncClient(address, self.access, retry=None) as client:
            while True:
                before = len(self.summaries)
                try:
                    await self._once(client, stream=before % 2 == 1)
                except ServerError as error:
                    self.unanswered += len(self.summaries) == before
                    if not until_killed.is_set():
                        self.failures.append(str(error))
                    return

    async def _once(self, client: AsyncClient, *, stream: bool) -> None:
        task, text = self.question.task_id, self.question.text
        if not stream:
            self.summaries.append((await client.generate(task, text, **PARAMETERS)).summary)
            return
        async for piece in client.stream(task, text, **PARAMETERS):
            if piece.HasField("summary"):
                self.summaries.append(piece.summary)

    def wrong(self, counted: Sequence[int]) -> str:
        """What is wrong with the server's sums of this tenant (in the order of _NAMES); empty if nothing is."""
        answered = [len(self.summaries), *(sum(getattr(each, name) for each in self.summaries) for name in _NAMES[1:])]
        requests, prompt, cached, completion = (one - other for one, other in zip(counted, answered, strict=True))
        # An unanswered call has the same prompt as all others, and at least a token.
        prompt_tokens = self.summaries[0].prompt_tokens if self.summaries else 0
        right = (
            0 <= requests <= self.unanswered
            and prompt == requests * prompt_tokens
            and 0 <= cached <= requests * prompt_tokens
            and 0 <= completion <= requests * PARAMETERS["max_new_tokens"]
        )
        return "" if right else f"counted {list(counted)}, answered {answered}, {self.unanswered} unanswered"


def run(options: Options) -> Row:
    """Kill, start again, and go on; at the end compare the sums of every tenant."""
    kills = 10 if options.full else 2
    rng = random.Random(options.seed)
    keys, entries = {}, []
    for name in ("admin", *(f"tenant-{n}" for n in range(_TENANTS))):
        keys[name], entry = tenant(name, admin=name == "admin")
        entries.append(entry)
    settings: dict[str, Any] = {
        **SETTINGS,
        "backbone": options.backbone,
        "adapters": options.adapters,
        "tenants": write_tenants(options.folder / "tenants.yaml", *entries),
        "usage_dir": options.folder / "usage",
    }
    admin = Access(api_key=keys.pop("admin"))
    asking: dict[str, Asking] = {}
    wrong: list[str] = []
    for _ in range(kills):
        with native_server(**settings) as server:
            with server.client(admin) as client:
                if not asking:
                    asked = questions(client, _TENANTS, options.seed)
                    asking = {
                        name: Asking(Access(api_key=key), question)
                        for (name, key), question in zip(keys.items(), asked, strict=True)
                    }
                counted = {
                    each.tenant: tuple(getattr(each, name) for name in _NAMES) for each in client.usage(by="total")
                }
            wrong += _wrong(asking, counted)
            asyncio.run(_kill_under_load(server.address, list(asking.values()), server.process.kill, rng))
    # What the next server would start with.
    usage = Usage(settings["usage_dir"], Metrics())
    counted = asyncio.run(_sums(usage))
    usage.close()
    wrong += _wrong(asking, counted)
    failures = [failure for each in asking.values() for failure in each.failures]
    for line in (*wrong, *failures[:5]):
        print(f"usage: {line}")
    answered = sum(len(each.summaries) for each in asking.values())
    unanswered = sum(each.unanswered for each in asking.values())
    besides = sum(sums[0] for sums in counted.values()) - answered
    return Row(
        f"usage after kill -9 of the server, {kills} times",
        "every answered call counted once, with its tokens; no other but calls that a kill left unanswered",
        f"{len(wrong)} wrong sums of {_TENANTS} tenants; {answered} answered, {unanswered} left unanswered, "
        f"{besides} of these counted, {len(failures)} other failures",
        met=not wrong and not failures and set(counted) <= set(asking),
    )


async def _kill_under_load(address: str, asking: Sequence[Asking], kill: Any, rng: random.Random) -> None:
    """Let every tenant get some answers, then kill within the time that an answer takes, at random."""
    killed = asyncio.Event()
    wanted = [len(each.summaries) + _ANSWERS for each in asking]
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for each in asking:
            tasks.create_task(each.ask(address, killed))
        while any(len(each.summaries) < n and not each.failures for each, n in zip(asking, wanted, strict=True)):
            await asyncio.sleep(0.01)
        await asyncio.sleep(rng.random() * (time.monotonic() - began) / _ANSWERS)
        killed.set()
        kill()


def _wrong(asking: Mapping[str, Asking], counted: Mapping[str, Sequence[int]]) -> list[str]:
    """A line for every tenant whose sums are wrong."""
    found = {name: asking[name].wrong(counted.get(name, (0, 0, 0, 0))) for name in asking}
    return [f"{name}: {why}" for name, why in found.items() if why]


async def _sums(usage: Usage) -> dict[str, tuple[int, ...]]:
    pages = [page async for page in usage.read(0, 2**40, "total")]
    return {tenant: astuple(counts) for page in pages for _, tenant, _, counts in page}
