"""Small random adapters for the default backbone."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mtlora.backbone import BackboneIdentity, identify, resolve
from mtlora.checkpoint.format import ProjectorConfig, TaskEntry
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig


@cache
def backbone_identity() -> BackboneIdentity:
    return identify(resolve("default"))


def entry(task_id: str, **fields: object) -> TaskEntry:
    return TaskEntry.model_validate({"id": task_id, "description": f"The task {task_id}."} | fields)


def write_adapter(
    folder: Path,
    tasks: Sequence[TaskEntry],
    *,
    backbone: BackboneIdentity | None = None,
    task_bias: bool = True,
    seed: int = 0,
    scale: float = 0.05,
    activation: str = "all",
    projector: ProjectorConfig | None = None,
) -> None:
    """A random adapter. Its answers mean nothing, but differ from the backbone's."""
    # Import here: torch takes seconds to import, and tests without an engine do not need it.
    from benchmarks.harness.adapters import random_tensors

    backbone = backbone or backbone_identity()
    config = MtLoRAConfig.model_validate(
        {"r": 4, "num_experts": 2, "num_groups": 2, "task_bias": task_bias, "activation": activation}
    )
    rows = [task.model_copy(update={"bias_index": row if task_bias else None}) for row, task in enumerate(tasks)]
    tensors = random_tensors(backbone, config, rows, seed=seed, scale=scale, projector=projector)
    write_checkpoint(folder, backbone=backbone, config=config, tasks=tuple(rows), tensors=tensors, projector=projector)
