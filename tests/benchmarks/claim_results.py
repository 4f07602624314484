"""Made-up results of the claim's runs."""

from typing import Any

TOTAL = 40


def result(part: str, name: str, accuracy: float, tasks: tuple[str, ...], seed: int) -> dict[str, Any]:
    """A result whose first examples are right."""
    right = round(TOTAL * accuracy)
    found = {"correct": right, "total": TOTAL, "right": "1" * right + "0" * (TOTAL - right)}
    return {
        "part": part, "name": name, "num_tasks": len(tasks), "seed": seed, "parameters": 1000,
        "config": {"learning_rate": 7e-4},
        "tasks": {task: {**found, "examples": "pictures" if part.startswith("maps") else task} for task in tasks},
    }  # fmt: skip
