"""Types of answers that requests bring: checked, compiled and remembered."""

import asyncio
import pickle
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.answer.constraint import checked
from mtlora.answer.types import MAX_LABELS
from mtlora.task import TaskSpec
from server.errors import AdapterError, Violation, invalid_argument, resource_exhausted
from server.isolation import ChildError, Limits, in_child
from server.rpc import answers
from server.scheduling.fair_thread import FairThread
from server.tenants import Tenant

# Most bytes of a request's own type, as a message.
_MAX_BYTES = 64 << 10
# Most states of its automaton, which the engine compiles while steps run.
_MAX_STATES = 10_000
_CHECK_S = 5.0
_KEPT = 1024
# Most requests of one tenant that may wait for a check: each holds a place of the server meanwhile.
_MOST_WAITING = 32


@dataclass(frozen=True)
class AnswerConstraint:
    """What holds an answer to its type: a text for the engine, the type's name, and the fewest tokens of an answer."""

    text: str
    type_name: str
    fewest_tokens: int


class CompilesAnswers(Protocol):
    def compile(self, constraints: Sequence[str]) -> Coroutine[Any, Any, list[int]]: ...


# Key: a type, and the task's marker and stop strings.
_Key = tuple[bytes, str | None, tuple[str, ...]]


class OwnTypes:
    """Types that requests bring. Each is checked once, in a child process: it may take long, or all of its memory."""

    def __init__(self) -> None:
        self._thread = FairThread("types")
        self._known: OrderedDict[_Key, AnswerConstraint] = OrderedDict()
        self._checks: dict[_Key, asyncio.Task[AnswerConstraint]] = {}
        # Requests that wait for a check, by tenant.
        self._waiting: Counter[str] = Counter()

    async def constraint(
        self, request: pb.GenerateRequest, task: TaskSpec | None, tenant: Tenant, engine: CompilesAnswers
    ) -> AnswerConstraint | None:
        """The constraint for the request's own type. Raises INVALID_ARGUMENT or RESOURCE_EXHAUSTED.

        None without a task. If the task has a type, the request's may be a subset of its labels, or the same type.
        """
        if task is None:
            return None
        if violations := list(_violations(request, task)):
            raise invalid_argument(violations)
        marker = None if request.without_adapter else task.answer_marker
        key = request.answer.SerializeToString(deterministic=True), marker, task.stop
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if self._waiting[tenant.id] >= _MOST_WAITING:
            raise resource_exhausted(f"{_MOST_WAITING} requests of this tenant wait for checks of their types", 1.0)
        if key not in self._checks:
            # Shield the check: other requests may wait for it when this one ends.
            check = asyncio.create_task(self._check(key, answers.as_data(request.answer), tenant, engine))
            self._checks[key] = check
            # Retrieve the exception, or asyncio logs it as never retrieved.
            check.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._waiting[tenant.id] += 1
        try:
            return await asyncio.shield(self._checks[key])
        finally:
            self._waiting[tenant.id] -= 1
            if not self._waiting[tenant.id]:
                del self._waiting[tenant.id]

    async def _check(
        self, key: _Key, data: dict[str, Any], tenant: Tenant, engine: CompilesAnswers
    ) -> AnswerConstraint:
        _, marker, stop = key
        loop = asyncio.get_running_loop()

        def check() -> AnswerConstraint:
            (found,) = in_child(checked, data, marker, stop, _MAX_STATES, limits=Limits(_CHECK_S))
            text, type_name = pickle.loads(found)
            # Compile in the tenant's turn, because the engine compiles in the order of calls.
            (fewest,) = asyncio.run_coroutine_threadsafe(engine.compile([text]), loop).result()
            return AnswerConstraint(text, type_name, fewest)

        try:
            constraint = await self._thread.run(tenant, None, check)
        except (ChildError, AdapterError) as error:
            raise invalid_argument([Violation("answer", str(error))]) from None
        finally:
            del self._checks[key]
        self._known[key] = constraint
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return constraint


def _violations(request: pb.GenerateRequest, task: TaskSpec) -> Iterator[Violation]:
    if request.free:
        yield Violation("free", "found together with answer; allowed: one of the two")
    if not request.answer.WhichOneof("type"):
        yield Violation("answer", "found no type; allowed: label, number, date, regex, json, grammar or text")
    elif (found := len(request.answer.label.labels)) > MAX_LABELS:
        yield Violation("answer.label.labels", f"found {found}; allowed: 2 to {MAX_LABELS}")
    elif (size := request.answer.ByteSize()) > _MAX_BYTES:
        yield Violation("answer", f"found {size} bytes; allowed: {_MAX_BYTES}")
    elif task.answer_type is not None and not answers.same(task.answer_type, request.answer):
        if task.labels is None:
            yield Violation("answer", f"task {task.id} has a type, {task.answer_type.type}; allowed: none, or the same")
        elif not request.answer.HasField("label") or not set(request.answer.label.labels) <= set(task.labels):
            yield Violation("answer", f"task {task.id} has labels; allowed: a subset of them")
