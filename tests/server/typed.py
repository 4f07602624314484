"""Tasks with types of answers, and an engine that keeps to what it is held to."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from mtlora.answer.constraint import TOKENS_PREFIX
from server.job import Delta, GenerationJob, ServedTask, TokenLogprob, TokenLogprobs
from tests.server.adapters import entry
from tests.server.fakes import FakeEngine, Service

LABEL: dict[str, Any] = {"type": "label", "labels": ["cat", "cow", "dog"]}
TYPED: dict[str, dict[str, Any]] = {
    "label": {"answer": LABEL},
    "worked": {"answer": LABEL, "answer_marker": "=>", "max_new_tokens": 16},
    "number": {"answer": {"type": "number", "minimum": 0, "maximum": 99}},
}


class Scripted(FakeEngine):
    """Prefers the first of the tokens it is held to by one nat each; other sequences get `text`, ended by a marker."""

    text, ends_by = "working ", 61

    def __init__(self) -> None:
        super().__init__()
        self.compiled: list[str] = []
        self.fewest = 3
        self.compiling = self.most_compiling = 0

    async def compile(self, constraints: Sequence[str]) -> list[int]:
        self.compiled += constraints
        self.compiling += 1
        self.most_compiling = max(self.most_compiling, self.compiling)
        await asyncio.sleep(0.001)
        self.compiling -= 1
        return [self.fewest] * len(constraints)

    async def generate(self, job: GenerationJob) -> AsyncGenerator[Delta, None]:
        self.jobs.append(job)
        constraint = job.sampling.constraint or ""
        if constraint.startswith(TOKENS_PREFIX):
            tokens = json.loads(constraint.removeprefix(TOKENS_PREFIX))
            top = tuple(TokenLogprob(token, chr(token), -float(i)) for i, token in enumerate(tokens))
            yield Delta("", 1, (TokenLogprobs(top[0], top),), "length")
        else:
            yield Delta(self.text, 2, finish_reason="stop", token_ids=(7, self.ends_by))


def with_types(made: Service) -> None:
    """Serve tasks with types, by the scripted engine."""
    made.use(Scripted())
    made.serve(*(ServedTask(entry(name, **fields), "alpha", "1", slot=None) for name, fields in TYPED.items()))
