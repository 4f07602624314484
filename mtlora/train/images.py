"""Training on images: an encoder's features, and heads that start from a linear probe.

Shape suffixes: B images, C channels, S side of an image, F size of a feature, K classes of all tasks, N examples.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mtlora.adapter import AdapterSet, Attachment
from mtlora.checkpoint.format import head_names
from mtlora.checkpoint.read import read_checkpoint
from mtlora.evaluation.answerers import Answerer
from mtlora.evaluation.calibration import fitted_temperatures
from mtlora.evaluation.images import Head, features, image_labeller, same_input
from mtlora.evaluation.scores import score
from mtlora.model.vision import fitted_tasks, new_adapted_encoder
from mtlora.suite.base import Example, Split, Suite, SuiteError
from mtlora.suite.mix import count_for
from mtlora.suite.vision.pixels import check_readable, read_pixels
from mtlora.task import TaskSpec
from mtlora.train.augment import augmented
from mtlora.train.config import TrainingConfig, TrainingError
from mtlora.train.cpu_backbone import speed_up_image_training
from mtlora.train.defaults import most_shown
from mtlora.train.examples import wanted_examples
from mtlora.train.modality import Part, digest
from mtlora.train.parallel import Ranks
from mtlora.train.result import evaluation_of, write_result
from mtlora.train.start import load_paths
from mtlora.vision.encoder import pool
from mtlora.vision.heads import Heads
from mtlora.vision.image_input import num_features
from mtlora.vision.images import prepare

# Values of states that are kept: a gigabyte in bfloat16.
_KEPT_VALUES = 2**29


class Images:
    """See `Modality`."""

    def __init__(self, config: TrainingConfig, suite: Suite, tasks: Sequence[TaskSpec], backbone: Path) -> None:
        if text := [task.id for task in tasks if task.image is None]:
            raise TrainingError(f"tasks: found images and text; allowed: one of them; of text is {text[0]}")
        self.config = config
        self.suite = suite
        self.adapted = new_adapted_encoder(backbone, config.method, len(tasks), config.torch_dtype)
        self.tasks = tasks = fitted_tasks(tasks, self.adapted.encoder.config)
        self.input = same_input(tasks)
        self.positions = self.adapted.encoder.config.num_positions(self.input.size)
        classes = _classes(tasks, config.heads)
        F = num_features(self.input.pooling, self.adapted.backbone.hidden_size)
        self.heads = Heads(classes, F, told=config.heads != "all classes")
        # The names are keys in the saved state.
        self.trained = nn.ModuleDict({"adapters": self.adapters, "heads": self.heads})
        self._row = {task.id: row for row, task in enumerate(tasks)}
        self.train, self.validation = self._examples("train"), self._examples("validation")
        self.ends_with_best = bool(self.validation)
        if not self.train:
            raise SuiteError(f"suite {suite.name}: no training examples; examples_per_task asks for none")
        if config.unreadable_images == "error":
            self._check_files()
        self._start: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if config.init_from is not None:
            self._warm_start(Path(config.init_from))
        layers = self.adapted.encoder.config.num_layers
        if config.frozen_layers >= layers:
            raise TrainingError(f"frozen_layers: found {config.frozen_layers}; allowed: fewer than the {layers} layers")
        if config.frozen_layers and config.baseline is not None:
            raise TrainingError("frozen_layers is for the adapter: it cannot be combined with a baseline")
        if isinstance(self.adapters, AdapterSet):
            for paths in self.adapters.layers[: config.frozen_layers]:
                paths.requires_grad_(False)
        # Cached states before the first trained layer, for training examples that are not augmented.
        self._entered: dict[int, torch.Tensor] = {}
        self._most_entered = _KEPT_VALUES // (self.positions * self.adapted.backbone.hidden_size)
        learns = any(parameter.requires_grad for parameter in self.adapters.parameters())
        self.batches = self._schedule() if learns else []

    @property
    def adapters(self) -> Attachment:
        """See `Modality`."""
        return self.adapted.adapters

    def _examples(self, split: Split) -> list[Example]:
        """The split's examples by the configuration, task by task. Raises SuiteError for a task without training."""
        found = wanted_examples(self.config, self.suite, self.tasks, split)
        having = {example.task_id for example in found}
        for task in self.tasks if split == "train" else ():
            if task.id not in having and count_for(self.config.examples_per_task, task.id) != 0:
                raise SuiteError(f"suite {self.suite.name}: task {task.id} has no training example (none found)")
        return found

    def _check_files(self) -> None:
        """Refuse a file that cannot be read before the run writes anything. Test images count: `eval` needs them."""
        held = [*self.train, *self.validation]
        for task in self.tasks if self.suite.finite else ():
            held += self.suite.examples(task.id, "test", None)
        check_readable((example, self.input.size) for example in held)

    def _schedule(self) -> list[list[int]]:
        config, size = self.config, self.config.batch_size
        counts = Counter(example.task_id for example in self.train)
        # A task with more images than that shows other ones in every epoch.
        most = most_shown(config, counts.values())
        batches: list[list[int]] = []
        for epoch in range(config.epochs):
            order = list(range(len(self.train)))
            random.Random(f"{config.seed}/{epoch}").shuffle(order)
            if max(counts.values()) > most:
                order = self._at_most(order, most)
            batches += [order[start : start + size] for start in range(0, len(order), size)]
        return batches[: config.max_steps]

    def _at_most(self, order: Sequence[int], most: float) -> list[int]:
        """The first `most` training examples of each task in this order."""
        seen: Counter[str] = Counter()
        found = []
        for i in order:
            seen[self.train[i].task_id] += 1
            if seen[self.train[i].task_id] <= most:
                found.append(i)
        return found

    def move(self, device: torch.device) -> None:
        """See `Modality`."""
        self.adapted.encoder.to(device)
        self.trained.to(device)
        speed_up_image_training(self.adapted.encoder)

    def begin(self) -> None:
        """Start heads from a linear probe of the backbone's features, or from the checkpoint of `init_from`."""
        self.adapters.eval()
        found_NF = [torch.empty(0)] * len(self.train)
        for places, features_BF in features(self.adapted, {t.id: t for t in self.tasks}, self.train, None):
            for place, feature_F in zip(places, features_BF, strict=True):
                found_NF[place] = feature_F
        features_NF, tasks_N, targets_N = torch.stack(found_NF), self._tasks(self.train), self._targets(self.train)
        device = self.heads.weight.device
        self.heads.to("cpu").fit(features_NF, tasks_N, targets_N)
        if self.config.probe_examples is not None:
            first = self._at_most(range(len(self.train)), self.config.probe_examples)
            self.heads.start(features_NF[first], tasks_N[first], targets_N[first])
        self.heads.to(device)
        for task in self.tasks:
            if task.id in self._start:
                self._set_head(self._row[task.id], *self._start[task.id])

    @torch.no_grad()
    def _set_head(self, row: int, weight_CF: torch.Tensor, bias_C: torch.Tensor) -> None:
        """Set a task's head from a checkpoint's folded weights."""
        classes = self.heads.classes[row]
        self.heads.weight[classes] = weight_CF.float() * self.heads.std_F
        self.heads.bias[classes] = bias_C.float() + weight_CF.float() @ self.heads.mean_F

    def _warm_start(self, folder: Path) -> None:
        """Take a checkpoint's paths, and its heads of tasks with the same id and labels."""
        found = read_checkpoint(folder, self.adapted.backbone)
        load_paths(self.adapters, found, self.config.adapter, self.tasks, folder)
        labels = {task.id: task.labels for task in found.manifest.tasks}
        for task in self.tasks:
            if labels.get(task.id) == task.labels:
                self._start[task.id] = found.head(task.id)

    def _tasks(self, examples: Sequence[Example]) -> torch.Tensor:
        return torch.tensor([self._row[example.task_id] for example in examples])

    def _targets(self, examples: Sequence[Example]) -> torch.Tensor:
        """The head output of each example's label."""
        targets = []
        for example in examples:
            row = self._row[example.task_id]
            targets.append(self.heads.classes[row][(self.tasks[row].labels or ()).index(example.target)])
        return torch.tensor(targets)

    def part(self, step: int, ranks: Ranks) -> Part:
        """See `Modality`."""
        whole = self.batches[step]
        share, counts = ranks.share(whole)
        chosen = [self.train[i] for i in share]
        entered_BTD = self._enter(share, step, ranks.device)
        tasks_B, targets_B = self._tasks(chosen).to(ranks.device), self._targets(chosen).to(ranks.device)
        told_B = tasks_B if self.heads.told else None

        def loss() -> torch.Tensor:
            return cross_entropy(self.heads(self._leave(entered_BTD, told_B), tasks_B), targets_B)

        weight = len(share) / len(whole) if counts else 0.0
        return Part(told_B, loss, weight, weight, len(whole) * self.positions)

    @torch.no_grad()
    def _enter(self, share: Sequence[int], step: int, device: torch.device) -> torch.Tensor:
        """States [B, T, D] of training examples before the first trained layer."""
        encoder, frozen = self.adapted.encoder, self.config.frozen_layers
        new = [i for i in share if i not in self._entered]
        made: dict[int, torch.Tensor] = {}
        if new:
            x_BTD = encoder.embed(torch.stack([self._augmented(i, step) for i in new]).to(device))
            with self.adapters.context.backbone_alone():
                for layer in encoder.model.layers[:frozen]:
                    x_BTD = layer(x_BTD)
            made = dict(zip(new, x_BTD, strict=True))
        if frozen and len(self._entered) < self._most_entered:
            self._entered |= {i: x for i, x in made.items() if not self._changes(i)}
        return torch.stack([made[i] if i in made else self._entered[i] for i in share])

    def _leave(self, x_BTD: torch.Tensor, told_B: torch.Tensor | None) -> torch.Tensor:
        """Features [B, F] in float32, from states before the first trained layer."""
        encoder = self.adapted.encoder
        with self.adapters.context.use(told_B):
            for layer in encoder.model.layers[self.config.frozen_layers :]:
                x_BTD = layer(x_BTD)
        return pool(encoder.model.norm(x_BTD), self.input.pooling, encoder.config.num_prefix).float()

    def _changes(self, index: int) -> bool:
        """Whether training changes an example each time."""
        image = self.tasks[self._row[self.train[index].task_id]].image
        return image is not None and bool(image.augment)

    def _augmented(self, index: int, step: int) -> torch.Tensor:
        """The encoder's input [3, S, S] of a training example, changed as its task allows."""
        example = self.train[index]
        task = self.tasks[self._row[example.task_id]]
        assert task.image is not None
        rng = random.Random(f"{self.config.seed}/{step}/{index}")
        changed = augmented(read_pixels(example, task.image.size), task.image.augment, rng)
        return torch.from_numpy(prepare(changed, task.image, self.adapted.mean, self.adapted.std))

    def images(self) -> dict[str, tuple[int, int, int | None]]:
        """See `Modality`."""
        train, validation = (Counter(each.task_id for each in split) for split in (self.train, self.validation))
        suite = self.suite
        return {
            task.id: (
                train[task.id],
                validation[task.id],
                len(suite.examples(task.id, "test", None)) if suite.finite else None,
            )
            for task in self.tasks
        }

    def speed(self, num_tokens: int, seconds: float) -> str:
        """See `Modality`."""
        return f"{num_tokens / self.positions / seconds:.1f} images/s"

    def validate(self) -> dict[str, Any]:
        """See `Modality`."""
        if not self.validation:
            return {}
        answers, loss = self._answers(self.validation, alone=False)
        scores = score(self.validation, answers)
        return {
            "loss": round(loss, 5),
            "accuracy": round(scores.mean, 4),
            "accuracy_by_task": {task.task_id: round(task.accuracy, 4) for task in scores.tasks},
        }

    def evaluate(self) -> dict[str, Any]:
        """See `Modality`: `backbone_alone` is by linear heads."""
        return evaluation_of(self.config, self.validation, self.answerer(), self.answerer(alone=True))

    def answerer(self, *, alone: bool = False) -> Answerer:
        """See `Modality`. alone: by the linear probe of the backbone's features."""

        return lambda examples: self._answers(examples, alone=alone)[0]

    def _answers(self, examples: Sequence[Example], *, alone: bool) -> tuple[list[str], float]:
        """Each example's answer, and the mean loss."""
        answers, targets_N, total = [""] * len(examples), self._targets(examples), 0.0
        for places, logits_BK in self._logits(examples, alone=alone):
            row = self._row[examples[places[0]].task_id]
            names = dict(zip(self.heads.classes[row], self.tasks[row].labels or (), strict=True))
            # Without the task told, another task's class may be likeliest: that is no answer.
            for place, output in zip(places, logits_BK.argmax(-1).tolist(), strict=True):
                answers[place] = names.get(output, "")
            total += cross_entropy(logits_BK, targets_N[places], reduction="sum").item()
        return answers, total / max(1, len(examples))

    @torch.inference_mode()
    def _logits(self, examples: Sequence[Example], *, alone: bool) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(places of examples of one task, their logits [B, K] on the CPU), batch by batch."""
        biased = None if alone else self._row
        for places, features_BF in features(
            self.adapted, {t.id: t for t in self.tasks}, examples, biased, told=self.heads.told
        ):
            tasks_B = torch.full(
                (len(places),), self._row[examples[places[0]].task_id], device=self.heads.weight.device
            )
            head = self.heads.alone if alone else self.heads
            yield places, head(features_BF.to(self.heads.weight.device), tasks_B).cpu()

    def digest(self) -> str:
        """See `Modality`."""
        return digest([(each.task_id, each.input, each.target) for each in self.train], self.batches)

    def provenance(self) -> dict[str, Any]:
        """See `Modality`."""
        images = dict.fromkeys(self._row, 0)
        for batch in self.batches:
            for i in batch:
                images[self.train[i].task_id] += 1
        return {"examples": len(self.train), "images": sum(images.values()), "images_by_task": images}

    def write(self, folder: Path, training: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """See `Modality`: heads in float32, with temperatures fitted on the validation images."""
        heads: dict[str, torch.Tensor] = {}
        for row in range(len(self.tasks)):
            heads |= dict(zip(head_names(row), self._folded(row), strict=True))
        write_result(
            folder, self.config, self.adapted, self.tasks, training=training, evaluation=evaluation, beside=heads,
            calibration=self._temperatures() if self.config.baseline is None else None,
        )  # fmt: skip

    def _folded(self, row: int) -> Head:
        """A task's head as the checkpoint has it."""
        weight_CF, bias_C = self.heads.folded(row)
        return weight_CF.float().cpu(), bias_C.float().cpu()

    def _temperatures(self) -> dict[str, float]:
        """Each task's temperature, for the probabilities that a server would give of the validation images."""
        labeller = image_labeller(self.adapted, self.tasks, lambda task_id: self._folded(self._row[task_id]), self._row)
        return fitted_temperatures(self.validation, labeller(self.validation))


def _classes(tasks: Sequence[TaskSpec], heads: str) -> list[list[int]]:
    """The head outputs of each task's labels."""
    if heads == "label words":
        words = {
            label: i for i, label in enumerate(dict.fromkeys(label for task in tasks for label in task.labels or ()))
        }
        return [[words[label] for label in task.labels or ()] for task in tasks]
    classes, start = [], 0
    for task in tasks:
        classes.append(list(range(start, start + len(task.labels or ()))))
        start += len(task.labels or ())
    return classes
