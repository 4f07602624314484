"""Multiple choice by likelihood: the option that a model finds likeliest, whatever it would generate.

Shape suffixes: B options, L positions, V vocabulary.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from mtlora.answer.labels import LabelTree
from mtlora.checkpoint.format import TaskEntry
from mtlora.evaluation.generate import Prompt, greedy_tokens, read_documents
from mtlora.model.language import AdaptedModel, Placed
from mtlora.task import TaskSpec

_LETTERED = re.compile(r"^(\([A-Z]\)) ", re.MULTILINE)
_DASHED = re.compile(r"^- (.+?)\s*$", re.MULTILINE)


def options_of(task: TaskSpec, text: str) -> tuple[str, ...]:
    """The answers to choose from: those that an input lists under `Options:`, else the task's closed set, else none."""
    _, listed, block = text.partition("\nOptions:\n")
    if listed and (found := _LETTERED.findall(block) or _DASHED.findall(block)):
        return tuple(found)
    return task.labels or ()


@torch.inference_mode()
def likeliest(
    adapted: AdaptedModel,
    task: TaskEntry,
    prompt: Prompt,
    options: Sequence[str],
    *,
    with_adapter: bool = True,
) -> str:
    """The option with the highest log-likelihood after the prompt, summed over its tokens; the first among equals.

    If the task has an answer marker, the adapter writes its working first, and the options are compared after it.
    """
    bias_index_B = torch.tensor([task.bias_index or 0])
    cache, _, (rest,) = read_documents(adapted, [prompt])
    prefix = list(rest)
    if with_adapter and task.answer_marker:
        prefix += _working(adapted, task, prompt)
    choices = [adapted.prompts.text(f" {option}") for option in options]
    length = max(map(len, choices))
    # Right-padded: with a causal mask, padding changes nothing before it.
    tokens_BL = torch.tensor([ids + [0] * (length - len(ids)) for ids in choices])
    context, model = adapted.adapters.context, adapted.model
    with nullcontext() if with_adapter else context.backbone_alone():
        with context.use(bias_index_B):
            inputs = adapted.inputs(torch.tensor([prefix]), _images(prompt))
            first = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(options))
        with context.use(bias_index_B.expand(len(options))):
            then = model(input_ids=tokens_BL, past_key_values=cache, use_cache=True)
    logits_BLV = torch.cat([first.logits.expand(len(options), -1, -1), then.logits[:, :-1]], dim=1)
    logprobs_BL = logits_BLV.float().log_softmax(-1).gather(-1, tokens_BL.unsqueeze(-1)).squeeze(-1)
    sums = [float(row[: len(ids)].sum()) for row, ids in zip(logprobs_BL, choices, strict=True)]
    return options[sums.index(max(sums))]


@torch.inference_mode()
def label_probabilities(adapted: AdaptedModel, task: TaskEntry, prompt: Prompt) -> dict[str, float]:
    """The probability of each of a task's labels after the prompt, and after the adapter's working if there is one."""
    tree = LabelTree({label: adapted.prompts.answer(label) for label in task.labels or ()})
    cache, _, (rest,) = read_documents(adapted, [prompt])
    prefix = [*rest, *(_working(adapted, task, prompt) if task.answer_marker else ())]
    found = []
    with adapted.adapters.context.use(torch.tensor([task.bias_index or 0])):
        for before, after in tree.branches:
            tokens_BL = torch.tensor([[*prefix, *before]])
            inputs = adapted.inputs(tokens_BL, _images(prompt))
            out = adapted.model(**inputs, past_key_values=cache, logits_to_keep=1)
            if cache is not None:
                cache.crop(-tokens_BL.shape[1])
            logprobs_V = out.logits[0, -1].float().log_softmax(-1)
            found.append({token: float(logprobs_V[token]) for token in after})
    return tree.probabilities(found)


def _images(prompt: Prompt) -> list[Placed]:
    return [prompt.image] if prompt.image else []


def _working(adapted: AdaptedModel, task: TaskEntry, prompt: Prompt) -> list[int]:
    """The tokens of the adapter's working and its marker; none if it answers without."""
    (generated,) = greedy_tokens(adapted, [task], [prompt])
    for end in range(1, len(generated) + 1):
        if str(task.answer_marker) in adapted.tokenizer.decode(generated[:end]):
            return generated[:end]
    return []
