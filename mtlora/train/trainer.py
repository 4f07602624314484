"""The training loop: a readable script over its parts."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mtlora
from mtlora.checkpoint.format import AdapterManifest, TaskEntry
from mtlora.checkpoint.read import read_manifest
from mtlora.checkpoint.write import write_checkpoint
from mtlora.evaluation.evaluate import offline_answerer, score
from mtlora.methods.checkpoint import BaselineManifest, read_baseline_manifest, write_baseline
from mtlora.model import adapter_tensors, new_adapted_model
from mtlora.suite import load_suite
from mtlora.suite.base import Example, Split, Suite, SuiteError
from mtlora.suite.mix import count_for
from mtlora.task import TaskSpec
from mtlora.train.clock import Clock
from mtlora.train.config import TrainingConfig
from mtlora.train.cpu_backbone import speed_up_training
from mtlora.train.data import Batch, Encoded, collate, encode, schedule
from mtlora.train.errors import TrainingError
from mtlora.train.losses import SPECTRAL_LOSSES, answer_loss, balance_loss
from mtlora.train.optimizer import learning_rate, make_optimizer
from mtlora.train.parallel import Ranks
from mtlora.train.start import StartingPoint, warm_start
from mtlora.train.state import RunFolder
from mtlora.train.validation import held_out


@dataclass(frozen=True)
class StepReport:
    """What one step measured, over all processes."""

    loss: float
    balance: float
    spectral: float
    grad_norm: float
    learning_rate: float
    num_tokens: int


class Trainer:
    """One run. `fit` trains (or goes on training) and writes the checkpoint.

    Under torchrun each process makes its own Trainer of the same configuration; the first one writes.
    """

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
        self.ranks = Ranks()
        self.clock = Clock()
        if config.threads:
            torch.set_num_threads(config.threads)
        # Same weights after a resume: index_add in the task biases' gradient is the one op that would race.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(config.seed)
        self.suite = load_suite(config.suite)
        self.tasks = _chosen_tasks(self.suite, config.tasks)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.adapted = new_adapted_model(backbone, config.method, len(self.tasks), dtype)
        if config.init_from is not None:
            warm_start(self.adapted, config.adapter, self.tasks, Path(config.init_from))
        self.skipped: Counter[str] = Counter()
        self.train_set = self._encode("train")
        self.validation_set = self._encode("validation")
        self._check_tasks_have_examples()
        self.batches = schedule(
            self.train_set,
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            epochs=config.epochs,
            seed=config.seed,
        )[: config.max_steps]
        if start:
            start.apply(self.adapted.adapters)
        self.adapted.to(self.ranks.device)
        speed_up_training(self.adapted.model)
        if config.gradient_checkpointing:
            _checkpoint_layers(self.adapted.model)
        self.optimizer = make_optimizer(self.adapted.adapters, config)
        self.step = 0
        # Dropout draws apart in each process; the weights above were drawn alike.
        torch.manual_seed(config.seed + self.ranks.rank)
        # Only now, with everything that can be refused behind us, does the run leave a trace.
        self.folder = RunFolder(out)
        state = self.folder.open(config, resume=resume) if self.ranks.first else None
        self.ranks.wait()
        if not self.ranks.first:
            state = self.folder.read_state()
        if state:
            self._restore(state)

    def fit(self) -> AdapterManifest | BaselineManifest:
        """Train to the end, evaluate, write the checkpoint; returns its manifest.

        A run that is complete already is left as it is. Raises TrainingError where loss or gradients are no numbers.
        """
        if self.folder.checkpoint.exists() and self.step == len(self.batches):
            return self._read_manifest()
        started = time.monotonic()
        with tqdm(
            total=len(self.batches), initial=self.step, desc="train", unit="step", disable=not self.ranks.first or None
        ) as bar:
            while self.step < len(self.batches):
                begin = time.monotonic()
                report = self.train_step()
                seconds = time.monotonic() - begin
                self.log_step(report, seconds)
                bar.set_postfix(loss=f"{report.loss:.3f}", tok_s=f"{report.num_tokens / seconds:.0f}")
                bar.update()
                last = self.step == len(self.batches)
                if (self.step % self.config.validate_every == 0 or last) and self.ranks.first:
                    self.folder.log({"step": self.step, **self.validate()})
                if self.step % self.config.save_every == 0 or last:
                    self.save()
        if self.ranks.first:
            self._finish(time.monotonic() - started)
        self.ranks.wait()
        return self._read_manifest()

    def train_step(self) -> StepReport:
        """One optimizer step on the next batch of the schedule."""
        config, attached, ranks, clock = self.config, self.adapted.adapters, self.ranks, self.clock
        attached.train()
        with clock("batch"):
            whole = [self.train_set[i] for i in self.batches[self.step]]
            share, counts = ranks.share(whole)
            # Padded as in one process, since the balance loss sees padding too.
            batch = collate(share, max(map(len, whole)))
            # This process' part of all answer tokens, and of all tokens with padding.
            answers = len(batch.answer_targets) / sum(len(e.answer) for e in whole) if counts else 0.0
            tokens = len(share) / len(whole) if counts else 0.0
            rate = learning_rate(config, self.step, config.schedule_steps or len(self.batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            self.optimizer.zero_grad(set_to_none=True)
        with attached.context.use(batch.task_index_B.to(ranks.device)):
            with clock("forward"):
                loss = answers * self._answer_loss(batch)
            with clock("balance"):
                balance = self._balance(tokens)
            with clock("spectral"):
                spectral = self._spectral()
            self._check_finite(loss, balance, spectral)
            with clock("backward"):
                (loss + config.balance_weight * balance).backward()
        if spectral.requires_grad:
            with clock("spectral"):
                # The same in every process, so each gives its part of the sum.
                (spectral * (config.spectral_weight / ranks.world)).backward()
        with clock("exchange"):
            ranks.sum_gradients(attached.parameters())
            loss = ranks.sum(loss.detach())
        with clock("optimizer"):
            trained = [parameter for parameter in attached.parameters() if parameter.requires_grad]
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            if not torch.isfinite(grad_norm):
                raise TrainingError(
                    f"step {self.step + 1}: the gradients' norm is {grad_norm.item()} (loss {loss.item()}); the last "
                    "saved state is untouched; try a lower learning_rate"
                )
            self.optimizer.step()
        self.step += 1
        return StepReport(loss.item(), balance.item(), spectral.item(), grad_norm.item(), rate, sum(map(len, whole)))

    def log_step(self, report: StepReport, seconds: float) -> None:
        """Append a step to the run's log."""
        if not self.ranks.first:
            return
        with self.clock("log"):
            self.folder.log(
                {
                    "step": self.step,
                    **{k: round(v, 6) for k, v in vars(report).items()},
                    "seconds": round(seconds, 4),
                    "tokens_per_second": round(report.num_tokens / seconds, 1),
                }
            )

    def save(self) -> None:
        """Save a state to go on from."""
        with self.clock("save"):
            generators = self.ranks.gather(_random_state(self.ranks.device))
            if self.ranks.first:
                self.folder.save(
                    {
                        "step": self.step,
                        "adapter": self.adapted.adapters.state_dict(),
                        "optimizer": self.optimizer.state_dict(),
                        "generators": generators,
                    }
                )

    def _answer_loss(self, batch: Batch) -> torch.Tensor:
        states_AD = self.adapted.answer_states(batch.tokens_BL, batch.task_index_B, batch.answer_rows)
        return answer_loss(states_AD, self.adapted.model.lm_head, batch.answer_targets.to(states_AD.device))

    def _balance(self, share: float) -> torch.Tensor:
        routing = self.adapted.adapters.mean_routing() if self.config.balance_weight else []
        if not routing:
            return torch.zeros((), device=self.ranks.device)
        if self.ranks.world > 1:
            routing = list(self.ranks.sum(torch.stack(routing) * share))
        return balance_loss(routing)

    def _spectral(self) -> torch.Tensor:
        """Mean over all blocks, or linear layers."""
        config = self.config
        stacks = self.adapted.adapters.experts() if config.spectral != "off" and config.spectral_weight else []
        loss, matrices = torch.zeros((), device=self.ranks.device), sum(map(len, stacks))
        for stack in stacks:
            loss = loss + SPECTRAL_LOSSES[config.spectral](stack) * (len(stack) / matrices)
        return loss

    def _check_finite(self, loss: torch.Tensor, balance: torch.Tensor, spectral: torch.Tensor) -> None:
        if not torch.isfinite(loss + balance + spectral):
            raise TrainingError(
                f"step {self.step + 1}: loss is {loss.item()} (balance {balance.item()}, spectral {spectral.item()}); "
                "the last saved state is untouched; try a lower learning_rate"
            )

    def validate(self) -> dict[str, Any]:
        """`held_out` of the validation split, where there is one; the last evaluation, in `fit`, generates."""
        if not self.validation_set:
            return {}
        self.adapted.adapters.eval()
        found = held_out(self.adapted, self.tasks, self.validation_set)
        return {f"validation_{name}": value for name, value in found.items()}

    def _finish(self, seconds: float) -> None:
        biased = self.config.baseline is None and self.config.adapter.task_bias
        entries = tuple(
            TaskEntry(**task.model_dump(), bias_index=i if biased else None) for i, task in enumerate(self.tasks)
        )
        self.adapted.adapters.eval()
        examples = [example for task in self.tasks for example in self._examples(task, "validation")]
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
        training = {
            "mtlora_version": mtlora.__version__,
            "torch_version": torch.__version__,
            "config": self.config.model_dump(mode="json"),
            "steps": len(self.batches),
            "examples": len(self.train_set),
            "tokens": sum(self.tokens_by_task().values()),
            "tokens_by_task": self.tokens_by_task(),
            "longer_examples_skipped": dict(self.skipped),
            "trainable_parameters": self.num_parameters,
            "seconds_since_last_start": round(seconds, 1),
            "processes": self.ranks.world,
        }
        if self.config.baseline is not None:
            manifest = BaselineManifest(
                backbone=self.adapted.backbone, config=self.config.baseline, tasks=entries, training=training,
                evaluation=evaluation,
            )  # fmt: skip
            write_baseline(self.folder.checkpoint, manifest, adapter_tensors(self.adapted.adapters, torch.float32))
            return
        write_checkpoint(
            self.folder.checkpoint,
            backbone=self.adapted.backbone,
            config=self.config.adapter,
            tasks=entries,
            tensors=adapter_tensors(self.adapted.adapters, torch.float16),
            training=training,
            evaluation=evaluation,
        )

    def _read_manifest(self) -> AdapterManifest | BaselineManifest:
        folder = self.folder.checkpoint
        return read_manifest(folder) if self.config.baseline is None else read_baseline_manifest(folder)

    @property
    def num_parameters(self) -> int:
        """Parameters that are attached to the backbone."""
        return sum(parameter.numel() for parameter in self.adapted.adapters.parameters())

    def tokens_by_task(self) -> dict[str, int]:
        """Tokens of prompts and answers that the schedule trains on, without padding."""
        tokens = dict.fromkeys((task.id for task in self.tasks), 0)
        for example in (self.train_set[i] for batch in self.batches for i in batch):
            tokens[self.tasks[example.task_index].id] += len(example)
        return tokens

    def _encode(self, split: Split) -> list[Encoded]:
        examples = [example for task in self.tasks for example in self._examples(task, split)]
        skipped = None
        if self.config.longer_examples == "skip":
            # Validation leaves out the same kind of example, but only what training lacks is reported.
            skipped = self.skipped if split == "train" else Counter()
        return encode(self.adapted.tokenizer, self.tasks, examples, max_length=self.config.max_length, skipped=skipped)

    def _examples(self, task: TaskSpec, split: Split) -> list[Example]:
        count: int | None = self.config.validation_per_task
        if split == "train":
            count = count_for(self.config.examples_per_task, task.id)
        return [] if count == 0 else self.suite.examples(task.id, split, count, self.config.seed)

    def _check_tasks_have_examples(self) -> None:
        trained = {example.task_index for example in self.train_set}
        for index, task in enumerate(self.tasks):
            if index not in trained and count_for(self.config.examples_per_task, task.id) != 0:
                skipped = self.skipped[task.id]
                cause = (
                    f"all {skipped} are longer than max_length {self.config.max_length}" if skipped else "none found"
                )
                raise SuiteError(f"suite {self.suite.name}: task {task.id} has no training example ({cause})")
        if not self.train_set:
            raise SuiteError(f"suite {self.suite.name}: no training examples; examples_per_task asks for none")

    def _restore(self, state: dict[str, Any]) -> None:
        self.adapted.adapters.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ranks.rank < len(state["generators"]):
            _set_random_state(state["generators"][self.ranks.rank], self.ranks.device)
        self.step = state["step"]


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _checkpoint_layers(model: Any) -> None:
    """Let each decoder layer keep its input alone; the layers, and they alone, then count as training."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        # Not layer.train(): what is inside, dropout if any, stays in evaluation mode.
        layer.training = True


def _chosen_tasks(suite: Suite, chosen: Sequence[str] | None) -> list[TaskSpec]:
    if chosen is None:
        return list(suite.tasks)
    by_id = {task.id: task for task in suite.tasks}
    if unknown := [task_id for task_id in chosen if task_id not in by_id]:
        raise SuiteError(f"suite {suite.name} has no task {', '.join(unknown)}; it has {', '.join(by_id)}")
    if twice := [task_id for task_id, count in Counter(chosen).items() if count > 1]:
        raise SuiteError(f"tasks: each task is named once; {', '.join(twice)} more than once")
    if not chosen:
        raise SuiteError("tasks: at least one task is needed; null means all of the suite")
    return [by_id[task_id] for task_id in chosen]
