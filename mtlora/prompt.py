"""Token ids of prompts and answers: the same rule while training, evaluating and serving."""

from collections.abc import Mapping, Sequence
from typing import Any

from mtlora.task import TaskSpec


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a rendered prompt, with the special tokens that the backbone's tokenizer puts before a text.

    A special token spelled out inside the text is encoded as plain text: no input can forge a turn or an end.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.truncation or fast.padding:
        return list(tokenizer(prompt, add_special_tokens=True, split_special_tokens=True)["input_ids"])
    # The same as the call above without its overhead, which a server pays for every request. Set the flag only if it
    # differs: no other thread may encode while it changes.
    if not fast.encode_special_tokens:
        fast.encode_special_tokens = True
    return list(fast.encode_batch_fast([prompt], add_special_tokens=True)[0].ids)


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the backbone's chat template, ready for the assistant's turn.

    The template spells out special tokens as text, so contents must hold none: see `special_tokens_in`.
    """
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_answer(tokenizer: Any, target: str) -> list[int]:
    """Token ids that a model should generate after the prompt: a blank, the answer, the end-of-sequence token.

    Encoded apart from the prompt: inference encodes the prompt alone, which fixes its last token.
    """
    ids = tokenizer(" " + target, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def special_tokens_in(tokenizer: Any, text: str) -> list[str]:
    """The backbone's special tokens that `text` spells out."""
    return sorted(token for token in tokenizer.all_special_tokens if token and token in text)


def encode_example(
    tokenizer: Any, task: TaskSpec, text: str, target: str, working: str | None = None
) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of one training example; the answer includes its working, if any."""
    return encode_prompt(tokenizer, task.render(text)), encode_answer(tokenizer, task.worked_answer(working, target))
