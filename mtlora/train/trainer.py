"""The training loop: a readable script over its parts."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mtlora
from mtlora.checkpoint import AdapterManifest, TaskEntry, read_manifest, write_checkpoint
from mtlora.config import adapter_parameters
from mtlora.errors import MtLoRAError
from mtlora.evaluate import offline_answerer, score
from mtlora.model import AdaptedModel, adapter_tensors, new_adapted_model
from mtlora.suite import load_suite
from mtlora.suite.base import Example, Suite, SuiteError
from mtlora.task import TaskSpec
from mtlora.train.config import TrainingConfig
from mtlora.train.data import Encoded, collate, encode, schedule
from mtlora.train.losses import SPECTRAL_LOSSES, answer_loss, balance_loss
from mtlora.train.start import StartingPoint
from mtlora.train.state import RunFolder

_VALIDATION_BATCH = 32


class TrainingError(MtLoRAError):
    """Training that cannot go on."""


@dataclass(frozen=True)
class StepReport:
    """What one step measured."""

    loss: float
    balance: float
    spectral: float
    grad_norm: float
    learning_rate: float
    num_tokens: int


class Trainer:
    """One run. `fit` trains (or goes on training) and writes the checkpoint."""

    def __init__(
        self,
        config: TrainingConfig,
        backbone: Path,
        out: Path,
        *,
        resume: bool = False,
        start: StartingPoint | None = None,
    ) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        # Same weights after a resume: index_add in the task biases' gradient is the one op that would race.
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.seed)
        self.suite = load_suite(config.suite)
        self.tasks = _chosen_tasks(self.suite, config.tasks)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.adapted = new_adapted_model(backbone, config.adapter, len(self.tasks), dtype)
        if start:
            start.apply(self.adapted.adapters)
        self.train_set = self._encode("train", config.examples_per_task)
        self.validation_set = self._encode("validation", config.validation_per_task)
        self.batches = schedule(self.train_set, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed)[
            : config.max_steps
        ]
        self.optimizer = _optimizer(self.adapted, config)
        self.step = 0
        # Only now, with everything that can be refused behind us, does the run leave a trace.
        self.folder = RunFolder(out)
        state = self.folder.open(config, resume=resume)
        if state:
            self._restore(state)

    def fit(self) -> AdapterManifest:
        """Train to the end, evaluate, write the checkpoint; returns its manifest.

        A run that is complete already is left as it is. Raises TrainingError when the loss is not a number.
        """
        if self.folder.checkpoint.exists() and self.step == len(self.batches):
            return read_manifest(self.folder.checkpoint)
        started = time.monotonic()
        with tqdm(total=len(self.batches), initial=self.step, desc="train", unit="step") as bar:
            while self.step < len(self.batches):
                begin = time.monotonic()
                report = self.train_step()
                tokens_per_second = report.num_tokens / (time.monotonic() - begin)
                self.folder.log(
                    {
                        "step": self.step,
                        **{k: round(v, 6) for k, v in vars(report).items()},
                        "tokens_per_second": round(tokens_per_second, 1),
                    }
                )
                bar.set_postfix(loss=f"{report.loss:.3f}", tok_s=f"{tokens_per_second:.0f}")
                bar.update()
                last = self.step == len(self.batches)
                if self.step % self.config.validate_every == 0 or last:
                    self.folder.log({"step": self.step, **self.validate()})
                if self.step % self.config.save_every == 0 or last:
                    self.folder.save(self._state())
        return self._finish(time.monotonic() - started)

    def train_step(self) -> StepReport:
        """One optimizer step on the next batch of the schedule."""
        config, adapters = self.config, self.adapted.adapters
        adapters.train()
        batch = collate([self.train_set[i] for i in self.batches[self.step]])
        learning_rate = _learning_rate(config, self.step, len(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        logits = self.adapted.answer_logits(batch.tokens_BL, batch.task_index_B, batch.answer_rows)
        loss = answer_loss(logits, batch.answer_targets)
        balance, spectral = torch.zeros(()), torch.zeros(())
        if config.balance_weight and config.adapter.num_experts > 1:
            balance = balance_loss([b.mean_routing_GN for b in adapters.blocks() if b.mean_routing_GN is not None])
        if config.spectral != "off" and config.spectral_weight:
            spectral = SPECTRAL_LOSSES[config.spectral](torch.stack([b.lora_B for b in adapters.blocks()]))
        total = loss + config.balance_weight * balance + config.spectral_weight * spectral
        if not torch.isfinite(total):
            raise TrainingError(
                f"step {self.step + 1}: loss is {total.item()} (answers {loss.item()}, balance {balance.item()}, "
                f"spectral {spectral.item()}); the last saved state is untouched; try a lower learning_rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(adapters.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        return StepReport(
            loss.item(), balance.item(), spectral.item(), grad_norm.item(), learning_rate, batch.num_tokens
        )

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """Loss and accuracy on the validation split.

        An answer whose every token is the most likely one given the tokens before it is what greedy decoding would
        have produced, so one forward pass a batch measures exact match.
        """
        if not self.validation_set:
            return {}
        self.adapted.adapters.eval()
        order = sorted(range(len(self.validation_set)), key=lambda i: len(self.validation_set[i]))
        loss_sum, answer_tokens = 0.0, 0
        correct = [0] * len(self.tasks)
        total = [0] * len(self.tasks)
        for start in range(0, len(order), _VALIDATION_BATCH):
            batch = collate([self.validation_set[i] for i in order[start : start + _VALIDATION_BATCH]])
            logits = self.adapted.answer_logits(batch.tokens_BL, batch.task_index_B, batch.answer_rows)
            loss_sum += answer_loss(logits, batch.answer_targets).item() * len(batch.answer_targets)
            answer_tokens += len(batch.answer_targets)
            wrong_B = torch.zeros(len(batch.task_index_B))
            wrong_B.index_add_(0, batch.answer_owner, (logits.argmax(-1) != batch.answer_targets).float())
            for task_index, wrong in zip(batch.task_index_B.tolist(), wrong_B.tolist(), strict=True):
                total[task_index] += 1
                correct[task_index] += wrong == 0
        accuracy = {task.id: round(c / t, 4) for task, c, t in zip(self.tasks, correct, total, strict=True) if t}
        return {
            "validation_loss": round(loss_sum / answer_tokens, 5),
            "validation_accuracy": round(sum(accuracy.values()) / len(accuracy), 4),
            "validation_accuracy_by_task": accuracy,
        }

    def _finish(self, seconds: float) -> AdapterManifest:
        entries = tuple(
            TaskEntry(**task.model_dump(), bias_index=i if self.config.adapter.task_bias else None)
            for i, task in enumerate(self.tasks)
        )
        self.adapted.adapters.eval()
        examples = [
            example
            for task in self.tasks
            for example in self._examples(task, "validation", self.config.validation_per_task)
        ]
        evaluation = {}
        if examples:
            answers = offline_answerer(self.adapted, entries)(examples)
            alone = offline_answerer(self.adapted, entries, with_adapter=False)(examples)
            evaluation = {
                "split": "validation",
                "examples_per_task": self.config.validation_per_task,
                "adapter": score(examples, answers).as_dict(),
                "backbone_alone": score(examples, alone).as_dict(),
            }
        return write_checkpoint(
            self.folder.checkpoint,
            backbone=self.adapted.backbone,
            config=self.config.adapter,
            tasks=entries,
            tensors=adapter_tensors(self.adapted.adapters, torch.float16),
            training={
                "mtlora_version": mtlora.__version__,
                "torch_version": torch.__version__,
                "config": self.config.model_dump(mode="json"),
                "steps": len(self.batches),
                "examples": len(self.train_set),
                "tokens": sum(len(self.train_set[i]) for batch in self.batches for i in batch),
                "trainable_parameters": adapter_parameters(
                    self.config.adapter,
                    self.adapted.backbone.hidden_size,
                    self.adapted.backbone.num_layers,
                    len(self.tasks),
                ),
                "seconds_since_last_start": round(seconds, 1),
            },
            evaluation=evaluation,
        )

    def _encode(self, split: Any, count: int | None) -> list[Encoded]:
        examples = [example for task in self.tasks for example in self._examples(task, split, count)]
        return encode(self.adapted.tokenizer, self.tasks, examples, max_length=self.config.max_length)

    def _examples(self, task: TaskSpec, split: Any, count: int | None) -> list[Example]:
        return [] if count == 0 else self.suite.examples(task.id, split, count, self.config.seed)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "adapter": self.adapted.adapters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.adapted.adapters.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        self.step = state["step"]


def _chosen_tasks(suite: Suite, chosen: Sequence[str] | None) -> list[TaskSpec]:
    if chosen is None:
        return list(suite.tasks)
    by_id = {task.id: task for task in suite.tasks}
    if unknown := [task_id for task_id in chosen if task_id not in by_id]:
        raise SuiteError(f"suite {suite.name} has no task {', '.join(unknown)}; it has {', '.join(by_id)}")
    return [by_id[task_id] for task_id in chosen]


def _optimizer(adapted: AdaptedModel, config: TrainingConfig) -> torch.optim.Optimizer:
    routing: list[torch.nn.Parameter] = []
    experts: list[torch.nn.Parameter] = []
    for name, parameter in adapted.adapters.named_parameters():
        if not parameter.requires_grad:
            continue
        (routing if name.endswith(("lora_route", "task_bias")) else experts).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": experts, "scale": 1.0, "weight_decay": config.weight_decay},
            {"params": routing, "scale": config.router_learning_rate_scale, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )


def _learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fraction of the peak."""
    warmup = max(1, round(steps * config.warmup_fraction))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = config.final_learning_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
