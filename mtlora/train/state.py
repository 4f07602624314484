"""A run's folder, and its state on disk: enough to resume after a kill at any moment, with the same result.

training.json   the run's configuration
log.jsonl       a line per step and per validation
lock            held while a process trains there
state.pt        step, adapter, optimizer and random generators; replaced by a rename
adapter/        the checkpoint, after training
"""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError

from mtlora.errors import MtLoRAError, describe, differences
from mtlora.files import lock_for_this_process, replace_file, sync
from mtlora.train.config import TrainingConfig

LOG = "log.jsonl"


class RunError(MtLoRAError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """The files of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "training.json"
        self.log_file = path / LOG
        self.state_file = path / "state.pt"
        self.checkpoint = path / "adapter"
        self._lock: IO[str] | None = None

    def open(self, config: TrainingConfig, *, resume: bool) -> dict[str, Any] | None:
        """Create the folder or open it again, for this process alone; returns the saved state to resume from, if any.

        Raises RunError if another process trains there, if the folder holds another run or parts of one, or holds this
        one and `resume` is off.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._keep_others_out()
        if self.config_file.exists():
            if not resume:
                raise RunError(f"{self.path} holds a run already: resume it with --resume, or choose another --out")
            try:
                previous = TrainingConfig.model_validate_json(self.config_file.read_bytes())
            except ValidationError as error:
                raise RunError(f"{self.config_file}: {describe(error)}") from None
            if changed := differences(previous, config):
                told = "; ".join(f"{name}: was {was!r}, now {now!r}" for name, (was, now) in changed.items())
                raise RunError(f"{self.config_file}: --resume needs the same configuration; {told}")
        else:
            if left := [path.name for path in (self.state_file, self.log_file, self.checkpoint) if path.exists()]:
                raise RunError(
                    f"{self.path} holds {', '.join(left)} of a run without its {self.config_file.name}: "
                    "remove the folder, or choose another --out"
                )
            replace_file(self.config_file, (config.model_dump_json(indent=2) + "\n").encode())
        state = self.read_state()
        self._cut_log(state["step"] if state else 0)
        return state

    def _keep_others_out(self) -> None:
        path = self.path / "lock"
        try:
            self._lock = lock_for_this_process(path)
        except BlockingIOError as error:
            raise RunError(
                f"{self.path}: {error.strerror or 'another process'} trains there; wait for its end, or choose another "
                "--out"
            ) from None
        except OSError as error:
            # The file system has no locks, for example NFS without a lock service.
            print(f"mtlora: {path}: cannot be locked ({error}): make sure that no other run uses it", file=sys.stderr)

    def read_state(self) -> dict[str, Any] | None:
        """The saved state, its tensors on the CPU; None before the first. Raises RunError for a damaged file."""
        if not self.state_file.exists():
            return None
        try:
            # weights_only: a malicious file cannot run code.
            state: dict[str, Any] = torch.load(self.state_file, weights_only=True, map_location="cpu")
        except Exception as error:
            # The unpickler may raise anything for damaged bytes.
            cause = " ".join(str(error).split()[:20]) or type(error).__name__
            raise RunError(f"{self.state_file}: not a saved state: {cause}") from None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the saved state, completely or not at all."""
        temporary = self.state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        sync(temporary)
        os.replace(temporary, self.state_file)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the log."""
        with self.log_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _cut_log(self, step: int) -> None:
        """Remove lines of steps that will run again, and a line that a kill left incomplete."""
        if not self.log_file.exists():
            return
        kept = []
        for line in self.log_file.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        replace_file(self.log_file, "".join(kept).encode())
