"""Answers from the Hugging Face model in this process."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mtlora.checkpoint.format import Checkpoint, TaskEntry
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError
from mtlora.evaluation.answerers import Answerer, Answerers, Labeller, answer_bar
from mtlora.evaluation.batches import cut
from mtlora.evaluation.generate import Prompt, greedy_answers
from mtlora.evaluation.likelihood import label_probabilities, likeliest, options_of
from mtlora.evaluation.shots import PromptOf, plain_prompt
from mtlora.model.language import AdaptedModel, Placed, load_adapted_model, new_adapted_model
from mtlora.suite.base import Example


class PromptError(MtLoRAError):
    """A prompt that the backbone cannot take."""


def text_answerers(
    backbone: Path,
    checkpoint: Checkpoint | None,
    tasks: Sequence[TaskEntry],
    dtype: torch.dtype,
    *,
    vision: Path | None = None,
    prompt_of: PromptOf = plain_prompt,
    likelihood: bool = False,
) -> Answerers:
    """A checkpoint's adapter, if there is one, and the backbone alone.

    dtype: the backbone's. vision: the vision backbone's folder, for tasks that take an image. likelihood: whether the
    likeliest option answers a multiple choice. Labels have probabilities with plain prompts alone. Raises MtLoRAError.
    """
    if checkpoint:
        adapted = load_adapted_model(backbone, checkpoint, dtype, vision)
    else:
        # The smallest possible adapter; its paths are never used. Activation `task` lets a document be read once.
        activation = "task" if all(task.document_template for task in tasks) else "all"
        config = MtLoRAConfig(r=1, num_experts=1, num_groups=1, task_bias=False, activation=activation)
        adapted = new_adapted_model(backbone, config, 1, dtype)
    make = likelihood_answerer if likelihood else offline_answerer
    return Answerers(
        make(adapted, tasks, prompt_of=prompt_of) if checkpoint else None,
        make(adapted, tasks, prompt_of=prompt_of, with_adapter=False),
        offline_labeller(adapted, tasks) if checkpoint and prompt_of is plain_prompt else None,
    )


def offline_answerer(
    adapted: AdaptedModel,
    tasks: Sequence[TaskEntry],
    *,
    with_adapter: bool = True,
    prompt_of: PromptOf = plain_prompt,
    batch_size: int = 32,
    batch_tokens: int = 8192,
) -> Answerer:
    """Answers from the Hugging Face model in this process, in batches of like length.

    A batch has at most `batch_size` prompts and, padded, `batch_tokens` prompt tokens, but at least one prompt.
    """
    by_id = {task.id: task for task in tasks}

    def answer(examples: Sequence[Example]) -> list[str]:
        prompts = _encode(adapted, by_id, examples, prompt_of, with_images=with_adapter)
        lengths = [len(prompt.ids) for prompt in prompts]

        def shortest_first(i: int) -> tuple[object, ...]:
            """Shortest answers, then shortest prompts; with an activated adapter, a document's prompts together."""
            n = prompts[i].document_length if adapted.activated else 0
            return n, prompts[i].ids[:n], by_id[examples[i].task_id].max_new_tokens, lengths[i]

        order = sorted(range(len(examples)), key=shortest_first)
        answers = [""] * len(examples)
        with answer_bar(len(examples), "answer", with_adapter) as bar:
            for rows in cut(order, lengths, batch_size, batch_tokens):
                batch_tasks = [by_id[examples[i].task_id] for i in rows]
                found = greedy_answers(adapted, batch_tasks, [prompts[i] for i in rows], with_adapter=with_adapter)
                for i, text in zip(rows, found, strict=True):
                    answers[i] = text
                bar.update(len(rows))
        return answers

    return answer


def likelihood_answerer(
    adapted: AdaptedModel,
    tasks: Sequence[TaskEntry],
    *,
    with_adapter: bool = True,
    prompt_of: PromptOf = plain_prompt,
) -> Answerer:
    """Like `offline_answerer`, but the likeliest option answers a multiple choice."""
    by_id = {task.id: task for task in tasks}
    generate = offline_answerer(adapted, tasks, with_adapter=with_adapter, prompt_of=prompt_of)

    def answer(examples: Sequence[Example]) -> list[str]:
        options = [options_of(by_id[example.task_id], example.input) for example in examples]
        open_ended = [i for i in range(len(examples)) if not options[i]]
        generated = generate([examples[i] for i in open_ended]) if open_ended else []
        answers = [""] * len(examples)
        for i, text in zip(open_ended, generated, strict=True):
            answers[i] = text
        prompts = _encode(adapted, by_id, examples, prompt_of, with_images=with_adapter)
        with answer_bar(len(examples) - len(open_ended), "choose", with_adapter) as bar:
            for i, example in enumerate(examples):
                if options[i]:
                    task = by_id[example.task_id]
                    answers[i] = likeliest(adapted, task, prompts[i], options[i], with_adapter=with_adapter)
                    bar.update()
        return answers

    return answer


def offline_labeller(adapted: AdaptedModel, tasks: Sequence[TaskEntry]) -> Labeller:
    """Probabilities of labels from the Hugging Face model in this process."""
    by_id = {task.id: task for task in tasks}

    def label(examples: Sequence[Example]) -> list[Mapping[str, float]]:
        prompts = _encode(adapted, by_id, examples, plain_prompt)
        with answer_bar(len(examples), "score", True) as bar:
            found: list[Mapping[str, float]] = []
            for example, prompt in zip(examples, prompts, strict=True):
                found.append(label_probabilities(adapted, by_id[example.task_id], prompt))
                bar.update()
        return found

    return label


def _encode(
    adapted: AdaptedModel,
    by_id: Mapping[str, TaskEntry],
    examples: Sequence[Example],
    prompt_of: PromptOf,
    *,
    with_images: bool = True,
) -> list[Prompt]:
    """Token ids of every prompt. Raises PromptError for a prompt that leaves no room to answer.

    The backbone alone cannot see: its prompts have no images.
    """
    room: int = adapted.model.config.max_position_embeddings
    prompts = []
    keys: Sequence[str | None] = [None] * len(examples)
    if with_images and any(by_id[example.task_id].picture for example in examples):
        if adapted.reader is None:
            raise PromptError("tasks take images: found no vision backbone; one is needed")
        keys = adapted.reader.read(by_id.values(), examples)
    for example, key in zip(examples, keys, strict=True):
        task = by_id[example.task_id]
        if key and adapted.reader and task.picture:
            texts = task.around_image(example.input)
            ids, at = adapted.prompts.around_image(texts, adapted.reader.num_soft_tokens(task.picture))
            prompt = Prompt(ids, image=Placed(at, key))
        else:
            prompt = Prompt(*adapted.prompts.parts(prompt_of(task, example)))
        if len(prompt.ids) + task.max_new_tokens > room:
            raise PromptError(
                f"task {task.id}: prompt of {len(prompt.ids)} tokens and {task.max_new_tokens} new ones; "
                f"the backbone takes {room}: {example.input[:80]!r}"
            )
        prompts.append(prompt)
    return prompts
