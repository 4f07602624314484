"""The training loop."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mtlora
from mtlora.checkpoint.format import AdapterManifest
from mtlora.model.baseline import BaselineManifest
from mtlora.train.block_outputs import block_outputs
from mtlora.train.config import DivergedError, TrainingConfig
from mtlora.train.examples import chosen_tasks, load_run_suite
from mtlora.train.losses import SPECTRAL_LOSSES, balance_loss
from mtlora.train.modality import open_modality
from mtlora.train.optimizer import learning_rate, make_optimizer
from mtlora.train.parallel import Ranks
from mtlora.train.profile import Clock
from mtlora.train.progress import Progress
from mtlora.train.result import read_result
from mtlora.train.start import StartingPoint
from mtlora.train.state import RunError, RunFolder


@dataclass(frozen=True)
class StepReport:
    """One step's measurements, over all processes."""

    loss: float
    balance: float
    spectral: float
    grad_norm: float
    learning_rate: float
    num_tokens: int


class Trainer:
    """One run. `fit` trains, or resumes training, and writes the checkpoint.

    vision: the vision backbone's folder, for tasks that take text and an image. announce: called with the trainer when
    all is checked and before any work is done. Raises MtLoRAError, with nothing written, for what cannot be trained.

    With torchrun, each process makes its own Trainer of the same configuration; the first one writes.
    """

    def __init__(
        self,
        config: TrainingConfig,
        backbone: Path,
        out: Path,
        *,
        vision: Path | None = None,
        resume: bool = False,
        start: StartingPoint | None = None,
        announce: Callable[["Trainer"], None] | None = None,
    ) -> None:
        self.config = config
        self.ranks = Ranks()
        self.clock = Clock()
        if config.threads:
            torch.set_num_threads(config.threads)
        # A resume must give the same weights: index_add in the task biases' gradient would race.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(config.seed)
        self.suite = load_run_suite(config)
        self.tasks = chosen_tasks(self.suite, config.tasks)
        self.work = open_modality(config, self.suite, self.tasks, backbone, vision)
        self.adapted, self.batches = self.work.adapted, self.work.batches
        if start:
            start.apply(self.work.adapters)
        self.work.move(self.ranks.device)
        self.step = 0
        # Of a run that ends with its best state: step and scores of that state, and the state.
        self.best: dict[str, Any] | None = None
        # What a saved state must match, beside the configuration.
        self.inputs = {"backbone": self.adapted.backbone.weights_fingerprint, "examples": self.work.digest()}
        # Seed each process differently for dropout; all of them drew the same weights above.
        torch.manual_seed(config.seed + self.ranks.rank)
        # Write files only after all checks.
        self.folder = RunFolder(out)
        state = self.folder.open(config, resume=resume) if self.ranks.first else None
        self.ranks.wait()
        if announce and self.ranks.first:
            announce(self)
        if not self.ranks.first:
            state = self.folder.read_state()
        self.optimizer = make_optimizer(self.work.trained, config, self._own_scales())
        if state:
            self._restore(state)
        else:
            self.work.begin()

    def fit(self, *, lines: bool = False) -> AdapterManifest | BaselineManifest:
        """Train to the end, evaluate, write the checkpoint; returns its manifest.

        lines: whether to tell progress in lines where stderr is no terminal. Does nothing for a complete run. Raises
        DivergedError if loss or gradients are not finite.
        """
        if self.folder.checkpoint.exists() and self.step == len(self.batches):
            self._take_best()
            return read_result(self.folder.checkpoint, self.config)
        started = time.monotonic()
        with Progress(len(self.batches), self.step, silent=not self.ranks.first, lines=lines) as progress:
            while self.step < len(self.batches):
                begin = time.monotonic()
                report = self.train_step()
                seconds = time.monotonic() - begin
                self.log_step(report, seconds)
                progress.step(report.loss, self.work.speed(report.num_tokens, seconds))
                last = self.step == len(self.batches)
                if (self.step % self.config.validate_every == 0 or last) and self.ranks.first:
                    found = self.validate()
                    self.folder.log({"step": self.step, **found})
                    self._keep_best(found)
                if self.step % self.config.save_every == 0 or last:
                    self.save()
        if self.ranks.first:
            self._finish(time.monotonic() - started)
        self.ranks.wait()
        return read_result(self.folder.checkpoint, self.config)

    def train_step(self) -> StepReport:
        """One optimizer step on the next batch of the schedule. Raises DivergedError as `fit` does."""
        config, work, ranks, clock = self.config, self.work, self.ranks, self.clock
        work.trained.train()
        with clock("batch"):
            part = work.part(self.step, ranks)
            rate = learning_rate(config, self.step, config.schedule_steps or len(self.batches))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            self.optimizer.zero_grad(set_to_none=True)
        # Keep the tasks set in the backward pass too, because gradient checkpointing recomputes layers there.
        with work.adapters.context.use(part.bias_index):
            with clock("forward"):
                loss = part.answers * part.loss()
            with clock("balance"):
                balance = self._balance(part.tokens)
            with clock("spectral"):
                spectral = self._spectral()
            self._check_finite(loss, balance, spectral)
            with clock("backward"):
                (loss + config.balance_weight * balance).backward()
        if spectral.requires_grad:
            with clock("spectral"):
                # This loss is the same in every process, so each contributes an equal part of the sum.
                (spectral * (config.spectral_weight / ranks.world)).backward()
        with clock("exchange"):
            ranks.sum_gradients(work.trained.parameters())
            loss = ranks.sum(loss.detach())
        with clock("optimizer"):
            trained = [parameter for parameter in work.trained.parameters() if parameter.requires_grad]
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            if not torch.isfinite(grad_norm):
                raise DivergedError(
                    f"step {self.step + 1}: the gradients' norm is {grad_norm.item()} (loss {loss.item()}); the last "
                    "saved state is untouched; try a lower learning_rate"
                )
            self.optimizer.step()
        self.step += 1
        return StepReport(loss.item(), balance.item(), spectral.item(), grad_norm.item(), rate, part.num_tokens)

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
                        "inputs": self.inputs,
                        "adapter": self.work.trained.state_dict(),
                        "optimizer": self.optimizer.state_dict(),
                        "generators": generators,
                        "best": self.best,
                    }
                )

    def _balance(self, share: float) -> torch.Tensor:
        routing = self.work.adapters.mean_routing() if self.config.balance_weight else []
        if not routing:
            return torch.zeros((), device=self.ranks.device)
        if self.ranks.world > 1:
            routing = list(self.ranks.sum(torch.stack(routing) * share))
        return balance_loss(routing)

    def _spectral(self) -> torch.Tensor:
        """The spectral loss, a mean over all blocks or linear layers."""
        config = self.config
        stacks = self.work.adapters.experts() if config.spectral != "off" and config.spectral_weight else []
        loss, matrices = torch.zeros((), device=self.ranks.device), sum(map(len, stacks))
        for stack in stacks:
            loss = loss + SPECTRAL_LOSSES[config.spectral](stack) * (len(stack) / matrices)
        return loss

    def _check_finite(self, loss: torch.Tensor, balance: torch.Tensor, spectral: torch.Tensor) -> None:
        if not torch.isfinite(loss + balance + spectral):
            raise DivergedError(
                f"step {self.step + 1}: loss is {loss.item()} (balance {balance.item()}, spectral {spectral.item()}); "
                "the last saved state is untouched; try a lower learning_rate"
            )

    def validate(self) -> dict[str, Any]:
        """Loss and accuracy on the validation split, if there is one."""
        self.work.trained.eval()
        return {f"validation_{name}": value for name, value in self.work.validate().items()}

    def _keep_best(self, found: dict[str, Any]) -> None:
        """Keep this step's state if it is the best one so far. Of equal accuracy, the lower loss is better."""
        if not self.work.ends_with_best:
            return
        accuracy, loss = found["validation_accuracy"], found["validation_loss"]
        if self.best is None or (accuracy, -loss) > (self.best["accuracy"], -self.best["loss"]):
            state = {name: tensor.detach().cpu().clone() for name, tensor in self.work.trained.state_dict().items()}
            self.best = {"step": self.step, "accuracy": accuracy, "loss": loss, "state": state}

    def _take_best(self) -> None:
        if self.best:
            self.work.trained.load_state_dict(self.best["state"])

    def _finish(self, seconds: float) -> None:
        self.work.trained.eval()
        self._take_best()
        training = {
            "mtlora_version": mtlora.__version__,
            "torch_version": torch.__version__,
            "config": self.config.model_dump(mode="json"),
            "steps": len(self.batches),
            **({"best_step": self.best["step"]} if self.best else {}),
            **self.work.provenance(),
            "trainable_parameters": self.num_parameters,
            "seconds_since_last_start": round(seconds, 1),
            "processes": self.ranks.world,
        }
        self.work.write(self.folder.checkpoint, training, self.work.evaluate())

    def _own_scales(self) -> dict[nn.Parameter, float]:
        """The factor on the learning rate of each path's experts."""
        relative = self.config.relative_expert_rate
        if relative is None:
            return {}
        return {path.lora_B: relative * output for path, output in block_outputs(self.work, self.ranks).items()}

    @property
    def num_parameters(self) -> int:
        """Number of parameters attached to the backbone."""
        return sum(parameter.numel() for parameter in self.work.adapters.parameters())

    def _restore(self, state: dict[str, Any]) -> None:
        was = state["inputs"]
        if changed := [f"{name}: was {was[name]}, now {now}" for name, now in self.inputs.items() if was[name] != now]:
            raise RunError(
                f"{self.folder.state_file}: --resume needs the same backbone and examples; {'; '.join(changed)}"
            )
        self.work.trained.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ranks.rank < len(state["generators"]):
            _set_random_state(state["generators"][self.ranks.rank], self.ranks.device)
        self.step = state["step"]
        # States of earlier releases have none.
        self.best = state.get("best")


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
