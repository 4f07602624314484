"""The training loop: a readable script over its parts."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import mtlora
from mtlora.checkpoint.format import AdapterManifest
from mtlora.families import decoder_layers
from mtlora.methods.checkpoint import BaselineManifest
from mtlora.model import new_adapted_model
from mtlora.suite import load_suite
from mtlora.task import check_activation
from mtlora.train.config import TrainingConfig, TrainingError
from mtlora.train.cpu_backbone import speed_up_training
from mtlora.train.data import Encoded, by_document, collate, collate_documents, schedule
from mtlora.train.examples import RunExamples, chosen_tasks
from mtlora.train.losses import SPECTRAL_LOSSES, balance_loss, batch_loss
from mtlora.train.optimizer import learning_rate, make_optimizer
from mtlora.train.parallel import Ranks
from mtlora.train.profile import Clock
from mtlora.train.result import evaluate, read_result, task_table, write_result
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
    """One run. `fit` trains, or resumes training, and writes the checkpoint.

    With torchrun, each process makes its own Trainer of the same configuration; the first one writes.
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
        # For the same weights after a resume: index_add in the task biases' gradient would race.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(config.seed)
        self.suite = load_suite(config.suite)
        self.tasks = chosen_tasks(self.suite, config.tasks)
        if config.baseline is None:
            check_activation(config.adapter, self.tasks)
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.adapted = new_adapted_model(backbone, config.method, len(self.tasks), dtype)
        window = getattr(self.adapted.model.config, "sliding_window", None)
        if self.adapted.activated and window and config.max_length > window:
            raise TrainingError(
                f"max_length: found {config.max_length}; allowed with activation task: up to {window}, the backbone's "
                "sliding window"
            )
        if config.init_from is not None:
            warm_start(self.adapted, config.adapter, self.tasks, Path(config.init_from))
        self.examples = RunExamples(config, self.suite, self.tasks, self.adapted.prompts)
        self.batches = schedule(
            self.examples.train,
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            epochs=config.epochs,
            seed=config.seed,
            document_tasks=config.document_tasks if self.adapted.activated else None,
        )[: config.max_steps]
        if start:
            start.apply(self.adapted.adapters)
        self.adapted.model.to(self.ranks.device)
        self.adapted.adapters.to(self.ranks.device)
        speed_up_training(self.adapted.model)
        if config.gradient_checkpointing:
            _checkpoint_layers(self.adapted.model)
        self.optimizer = make_optimizer(self.adapted.adapters, config)
        self.step = 0
        # Each process draws its own dropout; all drew the same weights above.
        torch.manual_seed(config.seed + self.ranks.rank)
        # Write files only now: everything that can be refused has been checked.
        self.folder = RunFolder(out)
        state = self.folder.open(config, resume=resume) if self.ranks.first else None
        self.ranks.wait()
        if not self.ranks.first:
            state = self.folder.read_state()
        if state:
            self._restore(state)

    def fit(self) -> AdapterManifest | BaselineManifest:
        """Train to the end, evaluate, write the checkpoint; returns its manifest.

        Does nothing for a complete run. Raises TrainingError if loss or gradients are not finite.
        """
        if self.folder.checkpoint.exists() and self.step == len(self.batches):
            return read_result(self.folder.checkpoint, self.config)
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
        return read_result(self.folder.checkpoint, self.config)

    def train_step(self) -> StepReport:
        """One optimizer step on the next batch of the schedule."""
        config, attached, ranks, clock = self.config, self.adapted.adapters, self.ranks, self.clock
        attached.train()
        with clock("batch"):
            whole = [self.examples.train[i] for i in self.batches[self.step]]
            share, counts = self._share(whole)
            if self.adapted.activated:
                batch = collate_documents(share)
                tokens = sum(map(_own_length, share)) / sum(map(_own_length, whole)) if counts else 0.0
            else:
                # Pad as in one process: the balance loss sees padding too.
                batch = collate(share, max(map(len, whole)))
                tokens = len(share) / len(whole) if counts else 0.0
            # This process' share of all answer tokens; `tokens`: of all tokens with a path.
            answers = len(batch.answer_targets_A) / sum(len(e.answer) for e in whole) if counts else 0.0
            rate = learning_rate(config, self.step, config.schedule_steps or len(self.batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            self.optimizer.zero_grad(set_to_none=True)
        # For the layers that gradient checkpointing computes again.
        with attached.context.use(batch.bias_index.to(ranks.device)):
            with clock("forward"):
                loss = answers * batch_loss(self.adapted, batch)
            with clock("balance"):
                balance = self._balance(tokens)
            with clock("spectral"):
                spectral = self._spectral()
            self._check_finite(loss, balance, spectral)
            with clock("backward"):
                (loss + config.balance_weight * balance).backward()
        if spectral.requires_grad:
            with clock("spectral"):
                # The same in every process, so each contributes its part of the sum.
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

    def _share(self, whole: Sequence[Encoded]) -> tuple[Sequence[Encoded], bool]:
        """(this process' examples of a batch, whether they count). A document's examples stay together."""
        if not self.adapted.activated:
            return self.ranks.share(whole)
        units, counts = self.ranks.share(by_document(whole))
        return [whole[i] for unit in units for i in unit], counts

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
        """Save a state to resume from."""
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

    def _balance(self, share: float) -> torch.Tensor:
        routing = self.adapted.adapters.mean_routing() if self.config.balance_weight else []
        if not routing:
            return torch.zeros((), device=self.ranks.device)
        if self.ranks.world > 1:
            routing = list(self.ranks.sum(torch.stack(routing) * share))
        return balance_loss(routing)

    def _spectral(self) -> torch.Tensor:
        """The spectral loss, a mean over all blocks or linear layers."""
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
        """`held_out` of the validation split, if there is one. The evaluation at the end of `fit` generates answers."""
        if not self.examples.validation:
            return {}
        self.adapted.adapters.eval()
        found = held_out(self.adapted, self.tasks, self.examples.validation)
        return {f"validation_{name}": value for name, value in found.items()}

    def _finish(self, seconds: float) -> None:
        self.adapted.adapters.eval()
        config, table = self.config, task_table(self.config, self.tasks)
        evaluation = evaluate(self.adapted, table, self.examples.of("validation"), config.validation_per_task)
        tokens_by_task = self.examples.tokens_by_task(self.batches)
        training = {
            "mtlora_version": mtlora.__version__,
            "torch_version": torch.__version__,
            "config": config.model_dump(mode="json"),
            "steps": len(self.batches),
            "examples": len(self.examples.train),
            "tokens": sum(tokens_by_task.values()),
            "tokens_by_task": tokens_by_task,
            "longer_examples_skipped": dict(self.examples.skipped),
            "trainable_parameters": self.num_parameters,
            "seconds_since_last_start": round(seconds, 1),
            "processes": self.ranks.world,
        }
        write_result(self.folder.checkpoint, config, self.adapted, table, training, evaluation)

    @property
    def num_parameters(self) -> int:
        """Number of parameters attached to the backbone."""
        return sum(parameter.numel() for parameter in self.adapted.adapters.parameters())

    def _restore(self, state: dict[str, Any]) -> None:
        self.adapted.adapters.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ranks.rank < len(state["generators"]):
            _set_random_state(state["generators"][self.ranks.rank], self.ranks.device)
        self.step = state["step"]


def _own_length(example: Encoded) -> int:
    """Tokens after the document's part."""
    return len(example) - example.document_length


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _checkpoint_layers(model: Any) -> None:
    """Let each decoder layer keep only its input; only the layers then count as training."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder_layers(model):
        # Not layer.train(): modules inside, such as dropout, stay in evaluation mode.
        layer.training = True
