"""Answerers of image tasks: an adapter with its heads, and linear heads on the backbone alone.

Shape suffixes: B images, C classes, F size of a feature, N examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mtlora.checkpoint.format import Checkpoint
from mtlora.errors import MtLoRAError
from mtlora.evaluation.answerers import Answerer, Answerers, Labeller
from mtlora.methods import HeadsConfig
from mtlora.model.vision import AdaptedEncoder, load_adapted_encoder, new_adapted_encoder
from mtlora.suite.base import Example, Suite, up_to
from mtlora.suite.mix import count_for
from mtlora.suite.vision.pixels import read_pixels
from mtlora.task import TaskSpec
from mtlora.vision.heads import Heads
from mtlora.vision.images import prepare

_BATCH = 64
# Training images per task that linear heads are fitted to if no checkpoint says how many its adapter had.
_LINEAR_EXAMPLES = 500
# A task's (weight [C, F], bias [C]).
Head = tuple[torch.Tensor, torch.Tensor]


def pixels(adapted: AdaptedEncoder, task: TaskSpec, example: Example) -> torch.Tensor:
    """An example as the encoder's input [3, S, S]. Raises ImageError naming the example."""
    assert task.image is not None
    pixels_HWC = read_pixels(example, task.image.size)
    return torch.from_numpy(prepare(pixels_HWC, task.image, adapted.mean, adapted.std))


@torch.inference_mode()
def features(
    adapted: AdaptedEncoder,
    tasks: Mapping[str, TaskSpec],
    examples: Sequence[Example],
    bias_rows: Mapping[str, int] | None,
    *,
    told: bool = True,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """(places of examples of one task, their features [B, F]), batch by batch.

    bias_rows: each task's row of the task biases; None for the backbone alone. told: whether the adapter gets the
    tasks.
    """
    by_task: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        by_task.setdefault(example.task_id, []).append(place)
    name = "backbone alone" if bias_rows is None else "adapter"
    with tqdm(total=len(examples), desc=f"images ({name})", unit="ex", leave=False, disable=None) as bar:
        for task_id, places in by_task.items():
            task = tasks[task_id]
            assert task.image is not None
            for start in range(0, len(places), _BATCH):
                chosen = places[start : start + _BATCH]
                pixels_BCSS = torch.stack([pixels(adapted, task, examples[i]) for i in chosen])
                if bias_rows is None:
                    with adapted.adapters.context.backbone_alone():
                        found_BF = adapted.features(pixels_BCSS, None, task.image.pooling)
                else:
                    index_B = torch.full((len(chosen),), bias_rows[task_id]) if told else None
                    found_BF = adapted.features(pixels_BCSS, index_B, task.image.pooling)
                yield chosen, found_BF.cpu()
                bar.update(len(chosen))


def image_labeller(
    adapted: AdaptedEncoder,
    tasks: Sequence[TaskSpec],
    head_of: Callable[[str], Head],
    bias_rows: Mapping[str, int] | None,
) -> Labeller:
    """Probabilities of labels, not calibrated. bias_rows: see `features`."""
    by_id = {task.id: task for task in tasks}
    # Cache results, so that an image is computed once for its answer and its probabilities.
    known: dict[tuple[str, str], Mapping[str, float]] = {}

    def label(examples: Sequence[Example]) -> list[Mapping[str, float]]:
        new = [example for example in examples if (example.task_id, example.input) not in known]
        for places, features_BF in features(adapted, by_id, new, bias_rows):
            task_id = new[places[0]].task_id
            weight_CF, bias_C = head_of(task_id)
            probabilities_BC = (features_BF @ weight_CF.float().T + bias_C.float()).softmax(-1)
            for place, row in zip(places, probabilities_BC.tolist(), strict=True):
                known[task_id, new[place].input] = dict(zip(by_id[task_id].labels or (), row, strict=True))
        return [known[example.task_id, example.input] for example in examples]

    return label


def answers_of(labeller: Labeller) -> Answerer:
    """The likeliest label of each example."""
    return lambda examples: [max(found, key=found.__getitem__) for found in labeller(examples)]


def checkpoint_labeller(adapted: AdaptedEncoder, checkpoint: Checkpoint) -> Labeller:
    """Probabilities of labels from a checkpoint's adapter and heads."""
    tasks = checkpoint.manifest.tasks
    rows = {task.id: task.bias_index or 0 for task in tasks}
    return image_labeller(adapted, tasks, checkpoint.head, rows)


def image_answerers(
    backbone: Path, checkpoint: Checkpoint | None, tasks: Sequence[TaskSpec], suite: Suite, dtype: torch.dtype
) -> Answerers:
    """A checkpoint's adapter with its heads, if there is one, and linear heads on the backbone alone.

    dtype: the backbone's. Linear heads are fitted to the training images of `suite` that the adapter was trained on.
    Raises MtLoRAError.
    """
    asked = [task for task in tasks if task.id in {each.id for each in suite.tasks}]
    trained = checkpoint.manifest.training.get("config", {}) if checkpoint else {}
    counts, seed = trained.get("examples_per_task", _LINEAR_EXAMPLES), trained.get("seed", 0)
    if checkpoint:
        adapted = load_adapted_encoder(backbone, checkpoint, dtype)
        labeller = checkpoint_labeller(adapted, checkpoint)
    else:
        adapted, labeller = new_adapted_encoder(backbone, HeadsConfig(), len(tasks), dtype), None

    def alone(examples: Sequence[Example]) -> list[str]:
        train = [e for t in asked for e in up_to(suite, t.id, "train", count_for(counts, t.id), seed)]
        return answers_of(image_labeller(adapted, asked, linear_heads(adapted, asked, train), None))(examples)

    return Answerers(answers_of(labeller) if labeller else None, alone, labeller)


def linear_heads(adapted: AdaptedEncoder, tasks: Sequence[TaskSpec], train: Sequence[Example]) -> Callable[[str], Head]:
    """Linear probes of the backbone alone, one a task, on its training examples. Raises MtLoRAError without any."""
    by_id = {task.id: task for task in tasks}
    features_by_task: dict[str, list[torch.Tensor]] = {}
    targets: dict[str, list[int]] = {}
    for places, features_BF in features(adapted, by_id, train, None):
        task_id = train[places[0]].task_id
        labels = list(by_id[task_id].labels or ())
        features_by_task.setdefault(task_id, []).append(features_BF)
        targets.setdefault(task_id, []).extend(labels.index(train[i].target) for i in places)
    if missing := [task.id for task in tasks if task.id not in targets]:
        raise MtLoRAError(f"linear heads: no training example of task {missing[0]}")
    heads = {}
    for task_id, parts in features_by_task.items():
        features_NF = torch.cat(parts)
        head = Heads([range(len(by_id[task_id].labels or ()))], features_NF.shape[1])
        head.fit(features_NF, torch.zeros(len(features_NF), dtype=torch.int64), torch.tensor(targets[task_id]))
        heads[task_id] = head.folded(0)
    return heads.__getitem__


def same_input(tasks: Sequence[TaskSpec]) -> Any:
    """What an image becomes for all of these tasks. Raises MtLoRAError if they differ in size or pooling."""
    inputs = {(task.image.size, task.image.pooling) for task in tasks if task.image}
    if len(inputs) != 1:
        told = ", ".join(f"{size} px with pooling {pooling}" for size, pooling in sorted(inputs))
        raise MtLoRAError(f"tasks trained together need one size and one pooling; found {told}")
    return tasks[0].image
