"""Measures how a training step's time is divided."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mtlora.train.config import TrainingError

if TYPE_CHECKING:
    from mtlora.train.trainer import Trainer

# Sections of the model's own work. Every other section should take at most 5 % of a step.
MODEL_SECTIONS = ("forward", "backward")
_WARM_UP = 3
_OPERATORS = 15


class Clock:
    """Seconds spent in named sections. Set `synchronise` to measure a GPU, whose work runs in the background."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.synchronise = False

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[section] = self.seconds.get(section, 0.0) + time.perf_counter() - begin

    def _wait(self) -> None:
        if self.synchronise and torch.cuda.is_available():
            torch.cuda.synchronize()


def profile_training(trainer: "Trainer", steps: int) -> dict[str, Any]:
    """Train `steps` steps after a warm-up; returns tokens per second, and the share of each section and operator.

    `sections`: name to share of the time; saving counts as often as the configuration says. `operators`: name to
    (share, calls) of the most expensive ones, over a few steps. Raises TrainingError if the schedule is too short.
    """
    needed = steps + 2 * _WARM_UP
    if len(trainer.batches) < needed:
        raise TrainingError(f"--profile {steps}: needs a run of {needed} steps, this one has {len(trainer.batches)}")
    for _ in range(_WARM_UP):
        trainer.train_step()
    clock = trainer.clock = Clock()
    clock.synchronise = True
    begin, tokens = time.perf_counter(), 0
    for _ in range(steps):
        report = trainer.train_step()
        tokens += report.num_tokens
        trainer.log_step(report, 1.0)
    seconds = time.perf_counter() - begin
    clock.seconds.pop("save", None)
    trainer.save()
    clock.seconds["save"] *= steps / trainer.config.save_every
    total = seconds + clock.seconds["save"]
    clock.seconds["rest"] = seconds - sum(s for name, s in clock.seconds.items() if name != "save")
    return {
        "tokens_per_second": tokens / total,
        "sections": {name: spent / total for name, spent in sorted(clock.seconds.items(), key=lambda item: -item[1])},
        "operators": _operators(trainer),
    }


def _operators(trainer: "Trainer") -> dict[str, tuple[float, int]]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(_WARM_UP):
            trainer.train_step()
    on_gpu = torch.cuda.is_available()
    found = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count)
             for e in profiler.key_averages()}  # fmt: skip
    total = sum(spent for spent, _ in found.values()) or 1.0
    dearest = sorted(found.items(), key=lambda item: -item[1][0])[:_OPERATORS]
    return {name: (spent / total, count) for name, (spent, count) in dearest}
