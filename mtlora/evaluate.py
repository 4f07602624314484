"""Accuracy by exact match, a task and overall, of anything that answers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from mtlora.checkpoint import TaskEntry
from mtlora.generate import greedy_answers
from mtlora.model import AdaptedModel
from mtlora.prompt import encode_prompt
from mtlora.suite.base import Example
from mtlora.task import TaskSpec, is_correct, normalise_answer

# Answers to examples, in their order.
Answerer = Callable[[Sequence[Example]], list[str]]


@dataclass(frozen=True)
class TaskScore:
    """One task's examples, right answers, and what always giving its most frequent target would score."""

    task_id: str
    total: int
    correct: int
    majority: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.total


@dataclass(frozen=True)
class Scores:
    """Scores of one answerer over a set of tasks."""

    tasks: tuple[TaskScore, ...]

    @property
    def mean(self) -> float:
        """Mean of the tasks' accuracies: every task counts the same."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """JSON form: mean, and per task its counts and accuracy."""
        return {
            "mean_accuracy": round(self.mean, 4),
            "tasks": {
                score.task_id: {
                    **{k: v for k, v in asdict(score).items() if k != "task_id"},
                    "accuracy": round(score.accuracy, 4),
                }
                for score in self.tasks
            },
        }


def score(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
    """Exact match of answers against their examples' targets, tasks in order of first appearance."""
    by_task: dict[str, list[tuple[Example, str]]] = {}
    for example, answer in zip(examples, answers, strict=True):
        by_task.setdefault(example.task_id, []).append((example, answer))
    return Scores(
        tuple(
            TaskScore(
                task_id,
                len(pairs),
                sum(is_correct(answer, example.target) for example, answer in pairs),
                Counter(normalise_answer(example.target) for example, _ in pairs).most_common(1)[0][1],
            )
            for task_id, pairs in by_task.items()
        )
    )


def offline_answerer(
    adapted: AdaptedModel, tasks: Sequence[TaskEntry], *, with_adapter: bool = True, batch_size: int = 32
) -> Answerer:
    """Answers from the Hugging Face model in this process, in batches of prompts of like length."""
    by_id = {task.id: task for task in tasks}

    def answer(examples: Sequence[Example]) -> list[str]:
        prompts = [encode_prompt(adapted.tokenizer, by_id[e.task_id].render(e.input)) for e in examples]
        order = sorted(range(len(examples)), key=lambda i: (by_id[examples[i].task_id].max_new_tokens, len(prompts[i])))
        answers = [""] * len(examples)
        label = "adapter" if with_adapter else "backbone alone"
        with tqdm(total=len(examples), desc=f"answer ({label})", unit="ex", leave=False) as bar:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch_tasks: list[TaskSpec] = [by_id[examples[i].task_id] for i in rows]
                bias_index_B = torch.tensor([by_id[examples[i].task_id].bias_index or 0 for i in rows])
                found = greedy_answers(
                    adapted, batch_tasks, [prompts[i] for i in rows], bias_index_B, with_adapter=with_adapter
                )
                for i, text in zip(rows, found, strict=True):
                    answers[i] = text
                bar.update(len(rows))
        return answers

    return answer


def server_answerer(address: str, *, without_adapter: bool = False, concurrency: int = 32) -> Answerer:
    """Answers from a running server, `concurrency` requests at a time. Raises ServerError where one fails."""
    from concurrent.futures import ThreadPoolExecutor

    from mtlora.client import Client

    def answer(examples: Sequence[Example]) -> list[str]:
        def ask(example: Example) -> str:
            return client.generate(example.task_id, example.input, without_adapter=without_adapter).text

        with Client(address) as client, ThreadPoolExecutor(concurrency) as pool:
            return list(tqdm(pool.map(ask, examples), total=len(examples), desc="ask", unit="ex", leave=False))

    return answer
