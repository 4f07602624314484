"""Accuracy by exact match, per task and overall."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mtlora.suite.base import Example
from mtlora.task import is_correct, normalise_answer

# A task counts as learned this far above the accuracy of always giving the most frequent answer.
FLOOR_MARGIN = 0.10


@dataclass(frozen=True)
class TaskScore:
    """One task's examples, its right answers, and how many its most frequent target would get right."""

    task_id: str
    total: int
    correct: int
    majority: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.total

    @property
    def floor(self) -> float:
        """The least accuracy of a learned task: that of the most frequent target, plus a margin."""
        return self.majority / self.total + FLOOR_MARGIN


@dataclass(frozen=True)
class Scores:
    """Scores of one answerer over a set of tasks."""

    tasks: tuple[TaskScore, ...]

    @property
    def mean(self) -> float:
        """Mean of the tasks' accuracies: every task counts the same."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    @property
    def below_floor(self) -> tuple[TaskScore, ...]:
        """The tasks that do not reach their floor."""
        return tuple(task for task in self.tasks if task.accuracy < task.floor - 1e-9)

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
