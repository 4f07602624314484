"""The workload: an endless, repeatable sequence of requests, drawn by the settings."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb

from loadtest import LoadTestError
from loadtest.mix import require_known, weights
from loadtest.settings import WorkloadSettings
from loadtest.tenants import Tenant
from loadtest.trace import Entry, Prompt, read_prompts
from mtlora.client import make_request
from mtlora.suite import Example, Suite, SuiteError, load_suite, up_to

# Common English words for inputs of a given length.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work night point home water room mother area money story "
    "fact month lot right study book eye job word business issue side kind head house service friend father power hour "
    "game line end member law car city community name president team minute idea kid body information back parent face "
    "others level office door health person art war history party result change morning reason research girl guy "
    "moment air teacher force education foot boy age policy process music market sense nation plan college interest "
    "death experience effect use class control field development role effort rate heart drug show leader light voice "
    "wife whole police mind price report decision son view relationship town road arm difference value building action"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Request:
    """One request, ready to send. `message` is a serialized GenerateRequest; `target` is the exact answer, if known."""

    task_id: str
    tenant: Tenant
    message: bytes
    target: str | None = None


class Workload:
    """Draws requests. The sequence continues from phase to phase.

    A task's inputs come in shuffled order, and none repeats before all were sent, because a repeated input would be in
    the server's prefix cache.
    """

    def __init__(self, settings: WorkloadSettings, tasks: Sequence[pb.Task], tenants: Sequence[Tenant]) -> None:
        self._settings = settings
        self._served = {task.id: task for task in tasks}
        self._tenants = {tenant.name: tenant for tenant in tenants}
        self._rng = random.Random(settings.seed)
        prompts = _prompts(settings, tasks)
        require_known(settings.tasks, list(self._served), "task", "the list of tasks")
        self.tasks = list(settings.tasks or sorted(prompts))
        if missing := [task_id for task_id in self.tasks if task_id not in prompts]:
            raise LoadTestError(f"no input for task {missing[0]!r}; there are inputs for {', '.join(sorted(prompts))}")
        require_known(self.tasks, list(self._served), "task", "the inputs")
        self.task_weights = weights(settings.task_mix, self.tasks, "task")
        self.tenant_weights = weights(settings.tenant_mix, list(self._tenants), "tenant")
        self._cumulative = list(accumulate(self.task_weights))
        self._tenant_cumulative = list(accumulate(self.tenant_weights))
        self._pools = {task_id: self._pool(task_id, prompts[task_id]) for task_id in self.tasks}

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        return self.request(Entry(at=0))

    def request(self, entry: Entry) -> Request:
        """The request of a line of a trace; draws what the line leaves out. Raises LoadTestError for unknown names."""
        task_id = entry.task or self._rng.choices(self.tasks, cum_weights=self._cumulative)[0]
        if task_id not in self._served:
            require_known([task_id], list(self._served), "task", "the trace")
        tenant = entry.tenant or self._rng.choices(list(self._tenants), cum_weights=self._tenant_cumulative)[0]
        if tenant not in self._tenants:
            require_known([tenant], list(self._tenants), "tenant", "the trace")
        asked: Entry | Prompt = entry
        if entry.input is None:
            if task_id not in self._pools:
                raise LoadTestError(f"the trace asks task {task_id!r} without an input, and there is none to draw")
            asked = next(self._pools[task_id])
        message = self._message(task_id, asked.input, entry.max_new_tokens or asked.max_new_tokens)
        return Request(task_id, self._tenants[tenant], message, asked.target)

    def _message(self, task_id: str, given: Any, max_new_tokens: int | None) -> bytes:
        parameters: dict[str, Any] = {}
        if max_new_tokens:
            parameters["max_new_tokens"] = max_new_tokens
        elif (length := self._settings.new_tokens) is not None:
            # A type would end its answers itself.
            parameters = {"max_new_tokens": self._rng.randint(length.low, length.high), "stop": [], "free": True}
        # Ask for reasoning too: it makes the first token visible at once, and answers comparable token by token.
        return bytes(make_request(task_id, given, include_reasoning=True, **parameters).SerializeToString())

    def _pool(self, task_id: str, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        if (length := self._settings.prompt_words) is not None:
            fields = self._served[task_id].fields
            while True:
                words = self._rng.choices(_WORDS, k=self._rng.randint(length.low, length.high))
                each = max(1, len(words) // len(fields))
                parts = [" ".join(words[i * each : (i + 1) * each] or _WORDS[:1]) for i in range(len(fields))]
                text = " ".join(words) if len(fields) == 1 else dict(zip(fields, parts, strict=True))
                yield Prompt(task=task_id, input=text)
        shuffled = list(prompts)
        random.Random(f"{self._settings.seed}/{task_id}").shuffle(shuffled)
        while True:
            yield from shuffled


def _prompts(settings: WorkloadSettings, tasks: Sequence[pb.Task]) -> dict[str, list[Prompt]]:
    """Inputs by task, for tasks that the server has. A prompt that names no task is an input of every task."""
    if settings.prompt_words:
        return {task.id: [] for task in tasks}
    served = [task.id for task in tasks]
    if settings.prompts:
        prompts: dict[str, list[Prompt]] = {}
        for prompt in read_prompts(settings.prompts):
            for task_id in [prompt.task] if prompt.task else [t.id for t in tasks if len(t.fields) == 1]:
                prompts.setdefault(task_id, []).append(prompt)
        return prompts
    try:
        suite = load_suite(settings.suite)
        found = {
            task.id: [Prompt(task=task.id, input=e.input, target=e.target) for e in _examples(suite, task.id, settings)]
            for task in suite.tasks
            if task.id in served and (not settings.tasks or task.id in settings.tasks)
        }
    except SuiteError as error:
        raise LoadTestError(str(error)) from None
    if not found and not settings.tasks:
        raise LoadTestError(
            f"the server serves no task of suite {suite.name}; it serves {', '.join(served[:10]) or 'none'} "
            "(--prompt-words asks any task with random words)"
        )
    return found


def _examples(suite: Suite, task_id: str, settings: WorkloadSettings) -> list[Example]:
    """The test examples that the settings ask for; all of them if a task in a folder has fewer."""
    if examples := up_to(suite, task_id, "test", settings.examples_per_task, settings.seed):
        return examples
    raise LoadTestError(f"suite {suite.name}: task {task_id} has no example in its test split")
