"""Training on text: prompts, with an image or without, and answers as tokens of a language backbone."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtlora.adapter import Attachment
from mtlora.checkpoint.format import PROJECTOR_NAMES
from mtlora.checkpoint.read import read_checkpoint
from mtlora.evaluation.answerers import Answerer
from mtlora.evaluation.offline import offline_answerer
from mtlora.families import decoder_layers
from mtlora.model.language import new_adapted_model
from mtlora.suite.base import Suite
from mtlora.task import TaskSpec, check_activation
from mtlora.train.config import TrainingConfig, TrainingError
from mtlora.train.cpu_backbone import speed_up_training
from mtlora.train.data import Encoded, by_document, collate, collate_documents, schedule
from mtlora.train.examples import RunExamples
from mtlora.train.losses import batch_loss
from mtlora.train.modality import Part, digest
from mtlora.train.parallel import Ranks
from mtlora.train.result import evaluation_of, task_table, write_result
from mtlora.train.start import warm_start
from mtlora.train.validation import held_out

# Most images whose states initialise the projector.
_MOST_IMAGES = 2048


class Text:
    """See `Modality`."""

    def __init__(
        self, config: TrainingConfig, suite: Suite, tasks: Sequence[TaskSpec], backbone: Path, vision: Path | None
    ) -> None:
        self.config = config
        self.tasks = tasks
        self.ends_with_best = False
        if config.baseline is None:
            check_activation(config.adapter, tasks)
        self.adapted = new_adapted_model(backbone, config.method, len(tasks), config.torch_dtype)
        window = getattr(self.adapted.model.config, "sliding_window", None)
        if self.adapted.activated and window and config.max_length > window:
            raise TrainingError(
                f"max_length: found {config.max_length}; allowed with activation task: up to {window}, the backbone's "
                "sliding window"
            )
        # See `Modality`: the vocabulary's head is frozen.
        self.trained: nn.Module = self.adapted.adapters
        if any(task.picture for task in tasks):
            if config.baseline is not None:
                raise TrainingError("baseline: found one; allowed with tasks that take an image: the adapter alone")
            if vision is None:
                raise TrainingError("tasks take images: found no vision backbone; one is needed")
            from mtlora.model.soft_tokens import ImageReader

            self.adapted.reader = ImageReader(vision, config.merge_patches, self.adapted.backbone.hidden_size)
            self.tasks = tasks = self.adapted.reader.fitted_tasks(tasks)
            # The names are keys in the saved state.
            self.trained = nn.ModuleDict({"adapters": self.adapters, "projector": self.adapted.reader.projector})
        if config.init_from is not None:
            warm_start(self.adapted, config.adapter, tasks, Path(config.init_from))
        room = self.adapted.model.config.max_position_embeddings
        self.examples = RunExamples(config, suite, tasks, self.adapted.prompts, room, self.adapted.reader)
        self.batches = schedule(
            self.examples.train,
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            epochs=config.epochs,
            seed=config.seed,
            document_tasks=config.document_tasks if self.adapted.activated else None,
        )[: config.max_steps]

    @property
    def adapters(self) -> Attachment:
        """See `Modality`."""
        return self.adapted.adapters

    def move(self, device: torch.device) -> None:
        """See `Modality`."""
        self.adapted.model.to(device)
        self.trained.to(device)
        speed_up_training(self.adapted.model)
        if self.config.gradient_checkpointing:
            _checkpoint_layers(self.adapted.model)

    def begin(self) -> None:
        """See `Modality`: a projector starts from the answers' words, or from the checkpoint of `init_from`."""
        reader = self.adapted.reader
        if reader is None:
            return
        said: dict[str, list[int]] = {}
        for each in self.examples.train:
            if each.image and (each.image.key in said or len(said) < _MOST_IMAGES):
                # Leave out the end-of-sequence token.
                said.setdefault(each.image.key, []).extend(each.answer[:-1])
        embed = self.adapted.model.get_input_embeddings()
        # Call the embedding module, because some families scale the rows.
        embeddings_VD = embed(torch.arange(embed.num_embeddings, device=embed.weight.device))
        words_D = [embeddings_VD[ids].float().mean(0) for ids in said.values()]
        words_PD = torch.cat(
            [word_D.expand(len(reader.states([key])), -1) for key, word_D in zip(said, words_D, strict=True)]
        )
        reader.projector.fit(reader.states(said).to(words_PD.device), words_PD, embeddings_VD)
        if self.config.init_from is not None:
            found = read_checkpoint(Path(self.config.init_from))
            if found.manifest.projector == reader.projector_config:
                reader.projector.unfold(*found.projector)

    def part(self, step: int, ranks: Ranks) -> Part:
        """See `Modality`."""
        whole = [self.examples.train[i] for i in self.batches[step]]
        share, counts = self.share(whole, ranks)
        if self.adapted.activated:
            batch = collate_documents(share)
            tokens = sum(map(_own_length, share)) / sum(map(_own_length, whole)) if counts else 0.0
        else:
            # Pad as in one process: the balance loss sees padding too.
            batch = collate(share, max(map(len, whole)))
            tokens = len(share) / len(whole) if counts else 0.0
        answers = len(batch.answer_targets_A) / sum(len(e.answer) for e in whole) if counts else 0.0
        return Part(
            batch.bias_index.to(ranks.device),
            lambda: batch_loss(self.adapted, batch),
            answers,
            tokens,
            sum(map(len, whole)),
        )

    def share(self, whole: Sequence[Encoded], ranks: Ranks) -> tuple[Sequence[Encoded], bool]:
        """(this process' examples of a batch, whether they count). A document's examples stay together."""
        if not self.adapted.activated:
            return ranks.share(whole)
        units, counts = ranks.share(by_document(whole))
        return [whole[i] for unit in units for i in unit], counts

    def images(self) -> dict[str, tuple[int, int, int | None]]:
        """See `Modality`."""
        return {}

    def speed(self, num_tokens: int, seconds: float) -> str:
        """See `Modality`."""
        return f"{num_tokens / seconds:.0f} tokens/s"

    def validate(self) -> dict[str, Any]:
        """See `Modality`. The evaluation at a run's end generates answers."""
        return held_out(self.adapted, self.tasks, self.examples.validation) if self.examples.validation else {}

    def evaluate(self) -> dict[str, Any]:
        """See `Modality`."""
        return evaluation_of(self.config, self.examples.evaluated, self.answerer(), self.answerer(alone=True))

    def answerer(self, *, alone: bool = False) -> Answerer:
        """See `Modality`. alone: by the backbone without the adapter."""
        return offline_answerer(self.adapted, task_table(self.config, self.tasks), with_adapter=not alone)

    def digest(self) -> str:
        """See `Modality`."""
        images = (each.image for each in self.examples.train if each.image)
        return digest(chain(self.examples.train, images), self.batches)

    def provenance(self) -> dict[str, Any]:
        """See `Modality`."""
        tokens_by_task = self.examples.tokens_by_task(self.batches)
        return {
            "examples": len(self.examples.train),
            "tokens": sum(tokens_by_task.values()),
            "tokens_by_task": tokens_by_task,
            "longer_examples_skipped": dict(self.examples.skipped),
        }

    def write(self, folder: Path, training: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """See `Modality`."""
        beside, projector = {}, None
        if (reader := self.adapted.reader) is not None:
            beside = dict(zip(PROJECTOR_NAMES, reader.projector.folded(), strict=True))
            projector = reader.projector_config
        write_result(
            folder, self.config, self.adapted, self.tasks, training=training, evaluation=evaluation, beside=beside,
            projector=projector,
        )  # fmt: skip


def _own_length(example: Encoded) -> int:
    """Number of tokens after the document's part."""
    return len(example) - example.document_length


def _checkpoint_layers(model: Any) -> None:
    """Let each decoder layer keep only its input; only the layers then count as training."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder_layers(model):
        # Do not call layer.train(): modules inside, such as dropout, stay in evaluation mode.
        layer.training = True
