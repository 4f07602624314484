"""A task more in an adapter, without moving the tasks that it has.

Training sees an adapter of one task, the new one: A, the experts and the routers are the adapter's own and frozen. It
learns a row of router biases, which mixes the experts that are there (mode `bias`), and also experts of its own with
their router rows (mode `experts`). Those are closed to the old tasks by a bias that leaves them a softmax weight of
exactly zero. The new row, experts and router rows are then put behind the old ones, whose bits nothing touches.

With mode `bias` an old task meets the very tensors it met before, and its outputs are the same bits on every backend.
With mode `experts` its sums have more terms, all of them zero: the same number, but matrix products may add in another
order then, and differ in the last bits. `compare` measures it.

Shape suffixes: N experts, M new experts, D hidden size, r rank, G groups, b tasks.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from mtlora.adapter import AdapterSet
from mtlora.checkpoint.format import AdapterManifest, Checkpoint, TaskEntry
from mtlora.checkpoint.write import check_replaceable, write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError, describe
from mtlora.model import AdaptedModel, load_adapted_model
from mtlora.prompt import encode_prompt
from mtlora.suite import load_suite, up_to
from mtlora.suite.base import Suite, SuiteError
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig
from mtlora.train.start import StartingPoint

Mode = Literal["bias", "experts"]

# What a mode trains with, unless told otherwise. One task needs no balance between experts, and has few examples: small
# batches make many steps of them (of 500 examples twice, batches of 4 gave 0.99 where joint training gives 0.96). A row
# of biases takes and needs larger steps than weights.
SETTINGS: dict[Mode, dict[str, Any]] = {
    "bias": {
        "epochs": 3, "batch_size": 4, "balance_weight": 0.0, "spectral": "off", "router_learning_rate_scale": 10.0,
    },
    "experts": {"epochs": 3, "batch_size": 4, "balance_weight": 0.0},
}  # fmt: skip
NEW_EXPERTS = 2

# Router bias of an expert that a task must not use: a power of two, exact in every dtype of a checkpoint, under which
# the softmax weight is zero in float32 unless router logits differ by more than 32,000.
CLOSED = -32768.0
_COMPARED_TEXTS = 4
_COMPARED_PROMPTS = 128
_COMPARED_AT_ONCE = 8
# Of the largest logit: what another order of adding may change over a model's depth.
_ROUNDING = 1e-3


class MergeError(MtLoRAError):
    """A task that cannot be added: says what is in the way."""


def merge(
    before: Checkpoint, backbone: Path, out: Path, *, mode: Mode, new_experts: int, config: TrainingConfig
) -> tuple[AdapterManifest, "Comparison"]:
    """Add the one task that `config` names to an adapter made beside `backbone`; write the result to `out`.

    config: `config.adapter` is `extended_config` of the checkpoint. new_experts: 0 with mode `bias`. Returns the new
    manifest and the old tasks' comparison. Raises MergeError, with nothing written, where an old task's outputs are
    not the same bits (mode `bias`) or differ by more than rounding (mode `experts`), and what training and writing
    raise.
    """
    check_replaceable(out.resolve())
    (task_id,) = config.tasks or ()
    suite = load_suite(config.suite)
    task = new_task(before, suite, task_id)
    if config.adapter != extended_config(before, new_experts):
        raise MergeError("adapter: the adapter's own hyper-parameters stay as they are")
    texts = [example.input for example in up_to(suite, task_id, "train", _COMPARED_TEXTS, config.seed)]
    learned, training, evaluation = train_task(before, config, backbone, new_experts)
    old = before.manifest
    earlier = old.training.get("merged")
    history = [
        *(earlier if isinstance(earlier, list) else ()),
        {"task": task_id, "mode": mode, "new_experts": new_experts, **training},
    ]
    contents: dict[str, Any] = {
        "backbone": old.backbone,
        "config": config.adapter,
        "tasks": merged_tasks(before, task),
        "training": old.training | {"merged": history},
        "evaluation": _with_scores(old.evaluation, evaluation),
    }
    tensors = merged_tensors(before, learned)
    after = Checkpoint(AdapterManifest(**contents, tensors_sha256="0" * 64), tensors)
    comparison = compare(backbone, before, after, texts)
    allowed = 0.0 if mode == "bias" else _ROUNDING * comparison.largest_logit
    if (mode == "bias" and not comparison.identical) or not comparison.largest_difference <= allowed:
        raise MergeError(
            f"not written: {comparison.differing} of {comparison.logits} logits of the old tasks differ, by up to "
            f"{comparison.largest_difference:.2g}; expected {'none' if mode == 'bias' else f'at most {allowed:.2g}'}"
        )
    return write_checkpoint(out, tensors=tensors, **contents), comparison


def _with_scores(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The old tasks' scores, which still hold, with the new task's; scores of another form give way to the new ones."""
    merged: dict[str, Any] = dict(old)
    for name in ("adapter", "backbone_alone"):
        if name not in new:
            continue
        try:
            tasks = {**old[name]["tasks"], **new[name]["tasks"]}
            mean = sum(score["accuracy"] for score in tasks.values()) / len(tasks)
        except (KeyError, TypeError):
            merged[name] = new[name]
        else:
            merged[name] = {"mean_accuracy": round(mean, 4), "tasks": tasks}
    return merged


def extended_config(checkpoint: Checkpoint, new_experts: int) -> MtLoRAConfig:
    """The adapter's config with `new_experts` more experts, and with task biases. Raises MergeError."""
    config = checkpoint.manifest.config
    if config.num_experts + new_experts == 1:
        raise MergeError("the adapter has one expert, so no router to steer by a bias; add experts (mode experts)")
    changed = {"num_experts": config.num_experts + new_experts, "task_bias": True}
    try:
        return MtLoRAConfig.model_validate(config.model_dump() | changed)
    except ValidationError as error:
        raise MergeError(f"{new_experts} new experts beside {config.num_experts}: {describe(error)}") from None


def starting_point(checkpoint: Checkpoint, new_experts: int, generator: torch.Generator) -> StartingPoint:
    """An adapter of one task to begin with: new experts zero, new router rows random, the bias the old tasks' mean."""
    config, tensors = checkpoint.manifest.config, checkpoint.tensors
    N, G = config.num_experts, config.num_groups
    start: dict[str, torch.Tensor] = {}
    trainable: dict[str, torch.Tensor] = {}
    for name in _blocks(checkpoint):
        lora_A, lora_B = tensors[f"{name}.lora_A"].float(), tensors[f"{name}.lora_B"].float()
        D = lora_A.shape[1]
        route_GND = tensors[f"{name}.lora_route"].float().view(G, N, D)
        # As a fresh adapter's: uniform within 1 / sqrt(D).
        fresh_GMD = (2 * torch.rand(G, new_experts, D, generator=generator) - 1) / math.sqrt(D)
        bias_GN = torch.zeros(G, N)
        if config.task_bias:
            bias_bGN = tensors[f"{name}.task_bias"].float()
            open_bGN = bias_bGN > CLOSED / 2
            bias_GN = (bias_bGN * open_bGN).sum(0) / open_bGN.sum(0).clamp_min(1)
        start |= {
            f"{name}.lora_A": lora_A,
            f"{name}.lora_B": torch.cat([lora_B, lora_B.new_zeros(new_experts, *lora_B.shape[1:])]),
            f"{name}.lora_route": torch.cat([route_GND, fresh_GMD], dim=1).flatten(0, 1),
            f"{name}.task_bias": torch.cat([bias_GN, torch.zeros(G, new_experts)], dim=1).unsqueeze(0),
        }
        new_N = torch.arange(N + new_experts) >= N
        trainable |= {
            f"{name}.lora_A": torch.zeros_like(lora_A, dtype=torch.bool),
            f"{name}.lora_B": new_N.view(-1, 1, 1).expand_as(start[f"{name}.lora_B"]),
            f"{name}.lora_route": new_N.repeat(G).unsqueeze(1).expand_as(start[f"{name}.lora_route"]),
            f"{name}.task_bias": torch.ones(1, G, N + new_experts, dtype=torch.bool),
        }
    return StartingPoint(start, trainable)


def merged_tensors(checkpoint: Checkpoint, learned: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors with what was learned behind them, each in the dtype that it had.

    learned: an adapter of one task, from a `starting_point` of this checkpoint.
    """
    config, tensors = checkpoint.manifest.config, checkpoint.tensors
    N, G, b = config.num_experts, config.num_groups, len(checkpoint.manifest.tasks)
    merged: dict[str, torch.Tensor] = {}
    for name in _blocks(checkpoint):
        lora_B, lora_route = tensors[f"{name}.lora_B"], tensors[f"{name}.lora_route"]
        D = lora_route.shape[1]
        new_route_GMD = learned[f"{name}.lora_route"].view(G, -1, D)[:, N:].to(lora_route.dtype)
        if config.task_bias:
            bias_bGN = tensors[f"{name}.task_bias"]
        else:
            # Without a bias is with a bias of zero.
            bias_bGN = lora_route.new_zeros(b, G, N)
        closed_bGM = bias_bGN.new_full((b, G, new_route_GMD.shape[1]), CLOSED)
        merged |= {
            f"{name}.lora_A": tensors[f"{name}.lora_A"],
            f"{name}.lora_B": torch.cat([lora_B, learned[f"{name}.lora_B"][N:].to(lora_B.dtype)]),
            f"{name}.lora_route": torch.cat([lora_route.view(G, N, D), new_route_GMD], dim=1).flatten(0, 1),
            f"{name}.task_bias": torch.cat(
                [torch.cat([bias_bGN, closed_bGM], dim=2), learned[f"{name}.task_bias"].to(bias_bGN.dtype)]
            ),
        }
    return merged


def merged_tasks(checkpoint: Checkpoint, task: TaskSpec) -> tuple[TaskEntry, ...]:
    """The task table with the new task as its last bias row."""
    old = checkpoint.manifest.tasks
    if not checkpoint.manifest.config.task_bias:
        old = tuple(entry.model_copy(update={"bias_index": i}) for i, entry in enumerate(old))
    return (*old, TaskEntry(**task.model_dump(exclude={"bias_index"}), bias_index=len(old)))


def new_task(checkpoint: Checkpoint, suite: Suite, task_id: str) -> TaskSpec:
    """The suite's task. Raises SuiteError where the suite lacks it, MergeError where the adapter has it."""
    if any(entry.id == task_id for entry in checkpoint.manifest.tasks):
        raise MergeError(f"the adapter has a task {task_id!r} already; a task is added once")
    by_id = {task.id: task for task in suite.tasks}
    if task_id not in by_id:
        raise SuiteError(f"suite {suite.name} has no task {task_id!r}; it has {', '.join(by_id)}")
    return by_id[task_id]


def train_task(
    checkpoint: Checkpoint, config: TrainingConfig, backbone: Path, new_experts: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Train the one task that `config` names; returns (learned tensors, provenance, evaluation).

    Raises MergeError for weight decay, which would move what is frozen, and what the trainer raises.
    """
    from mtlora.train.trainer import Trainer

    if config.weight_decay:
        raise MergeError(f"weight_decay: expected 0, found {config.weight_decay}: it would move what is frozen")
    start = starting_point(checkpoint, new_experts, torch.Generator().manual_seed(config.seed))
    with tempfile.TemporaryDirectory(prefix="mtlora-merge-") as folder:
        trainer = Trainer(config, backbone, Path(folder) / "run", start=start)
        manifest = trainer.fit()
        learned = {name: tensor.detach().clone() for name, tensor in trainer.adapted.adapters.state_dict().items()}
    return learned, manifest.training, manifest.evaluation


@dataclass(frozen=True)
class Comparison:
    """Old tasks' logits before and after, in float32: how many, how many differ, and by how much at most."""

    tasks: int
    prompts: int
    logits: int
    differing: int
    largest_difference: float
    largest_logit: float

    @property
    def identical(self) -> bool:
        """Whether every bit is the same."""
        return self.differing == 0


@torch.inference_mode()
def compare(folder: Path, before: Checkpoint, after: Checkpoint, texts: Sequence[str]) -> Comparison:
    """Logits of every old task on its prompts for `texts`, at every position, of two adapters beside one backbone."""
    old = load_adapted_model(folder, before, torch.float32)
    adapters = AdapterSet(
        after.manifest.config, old.backbone.hidden_size, old.backbone.num_layers, len(after.manifest.tasks)
    )
    adapters.load_state_dict({name: tensor.float() for name, tensor in after.tensors.items()})
    adapters.eval().attach(old.model)
    new = AdaptedModel(old.model, old.tokenizer, adapters, old.backbone)
    per_task = max(1, min(len(texts), _COMPARED_PROMPTS // len(before.manifest.tasks)))
    prompts = [
        (task.id, encode_prompt(old.tokenizer, task.render(dict.fromkeys(task.fields, text))))
        for task in before.manifest.tasks
        for text in texts[:per_task]
    ]
    prompts.sort(key=lambda prompt: len(prompt[1]))
    logits, differing, difference, largest = 0, 0, 0.0, 0.0
    for start in range(0, len(prompts), _COMPARED_AT_ONCE):
        batch = prompts[start : start + _COMPARED_AT_ONCE]
        length = max(len(ids) for _, ids in batch)
        tokens_BL = torch.tensor([ids + [0] * (length - len(ids)) for _, ids in batch])
        rows = torch.tensor([i * length + k for i, (_, ids) in enumerate(batch) for k in range(len(ids))])
        with adapters.context.backbone_alone():
            expected = old.answer_logits(tokens_BL, _rows_of(before, batch), rows)
        with old.adapters.context.backbone_alone():
            found = new.answer_logits(tokens_BL, _rows_of(after, batch), rows)
        logits += expected.numel()
        differing += int((expected.view(torch.int32) != found.view(torch.int32)).sum())
        difference = max(difference, (expected - found).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    return Comparison(len(before.manifest.tasks), len(prompts), logits, differing, difference, largest)


def _rows_of(checkpoint: Checkpoint, batch: Sequence[tuple[str, list[int]]]) -> torch.Tensor:
    return torch.tensor([checkpoint.manifest.task(task_id).bias_index or 0 for task_id, _ in batch])


def _blocks(checkpoint: Checkpoint) -> Iterator[str]:
    for layer in range(checkpoint.manifest.backbone.num_layers):
        for module in checkpoint.manifest.config.modules:
            yield f"layers.{layer}.{module}"
