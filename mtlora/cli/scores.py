"""Prints what `mtlora eval` and training measured: accuracies and calibration errors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mtlora.cli.output import print_table

if TYPE_CHECKING:
    from mtlora.evaluation.calibration import Calibration
    from mtlora.evaluation.scores import Scores

# Answerers and their names in the summary, in the order of the table's columns.
_SCORED = {"adapter": "mean", "another_image": "another image", "backbone_alone": "backbone alone"}


def summary(scores: "Mapping[str, Scores]") -> str:
    """One line of summary, without values that were not measured."""
    parts = [f"{len(next(iter(scores.values())).tasks)} tasks"]
    parts += [f"{label} {scores[name].mean:.2f}" for name, label in _SCORED.items() if name in scores]
    if "adapter" in scores:
        parts.append(f"tasks below floor {len(scores['adapter'].below_floor)}")
    return f"accuracy: {', '.join(parts)}"


def print_scores(evaluation: Mapping[str, Any]) -> None:
    """Print a row per task (adapter, backbone alone, most frequent answer) and the means; nothing for no evaluation.

    Raises KeyError, TypeError or similar if `evaluation` does not come from `Scores.as_dict`.
    """
    if not evaluation:
        return
    names = [name for name in _SCORED if name in evaluation]
    first = evaluation[names[0] if names else "adapter"]
    rows: list[tuple[object, ...]] = [
        (
            task_id,
            found["total"],
            *(f"{evaluation[name]['tasks'][task_id]['accuracy']:.2f}" for name in names),
            f"{found['majority'] / found['total']:.2f}",
        )
        for task_id, found in first["tasks"].items()
    ]
    total = sum(found["total"] for found in first["tasks"].values())
    majority = sum(found["majority"] / found["total"] for found in first["tasks"].values()) / len(first["tasks"])
    means = (f"{evaluation[name]['mean_accuracy']:.2f}" for name in names)
    rows.append(("mean over tasks", total, *means, f"{majority:.2f}"))
    headings = (name.replace("_", " ") for name in names)
    print_table("accuracy, exact match", ("task", "examples", *headings, "most frequent"), rows)
    if lengths := evaluation.get("by_document_length"):
        print_table(
            "accuracy by length of the document",
            ("tokens", "examples", *(name.replace("_", " ") for name in names)),
            [(row["tokens"], row["examples"], *(f"{row[name]:.2f}" for name in names)) for row in lengths],
        )


def print_calibration(found: "Calibration") -> None:
    """Print the calibration errors of labels on one line."""
    errors, by_chance = found.errors, found.by_chance
    print(
        f"expected calibration error of {found.total} labels: {errors['uncalibrated']:.3f}, {errors['stored']:.3f} at "
        f"the checkpoint's temperatures, {errors['fitted']:.3f} at temperatures fitted on these examples; perfect "
        f"probabilities would show {by_chance['uncalibrated']:.3f}, {by_chance['stored']:.3f} and "
        f"{by_chance['fitted']:.3f} on this many labels"
    )
