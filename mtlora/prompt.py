"""Encodes prompts and answers into token ids, in the same way in training, evaluation and serving."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

from mtlora.task import PromptParts, TaskSpec

# Marks around turns in chat templates that use no special tokens for them: [INST], <<SYS>>, <|user|>.
_MARK = re.compile(r"<<[^<>\s]+>>|<[^<>\s]+>|\[[^\[\]\s]+\]")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# By which factor normalisation may shorten a text in UTF-8: U+212A, three bytes, becomes the letter K.
_NFC_SHRINKS = 3
_LOSSLESS_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Metaspace"}

# (text, whether to add the tokens that the tokenizer puts around a text) -> ids.
_Encode = Callable[[str, bool], list[int]]


class PromptEncoder:
    """Encodes for one tokenizer, from any thread.

    A tokenizer has a mode: whether it recognises special tokens in texts. Each mode has its own copy here, so that
    threads do not change each other's results.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        self._plain = _encode_with(tokenizer, split_special_tokens=True)
        self._normalize = _normalizer(tokenizer)
        self._reserved: tuple[str, ...] = ()
        if self.has_chat_template:
            self._with_special = _encode_with(tokenizer, split_special_tokens=False)
            self._reserved = _reserved(tokenizer, self._normalize)
        self._reserved_starts = {text[0] for text in self._reserved}
        self._most_bytes_per_token, self._dropped_bytes = _token_bytes(tokenizer)

    def prompt(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt, with the special tokens that the backbone's tokenizer puts before a text.

        A special token spelled out inside the text is encoded as plain text: no input can forge a turn or an end.
        """
        return self._plain(prompt, True)

    def parts(self, parts: PromptParts, document: Sequence[int] | None = None) -> tuple[list[int], int]:
        """(token ids of a rendered prompt, how many of them are the document part's: the activation point).

        Each part is encoded separately, so the document's ids are the same for every task. They include the special
        tokens that the tokenizer puts before a text. Without a document part, the point is 0. document: the document
        part's ids, if already known.
        """
        if not parts.document:
            return self.prompt(parts.task), 0
        document = self.prompt(parts.document) if document is None else document
        return [*document, *self.text(parts.task)], len(document)

    def around_image(self, texts: tuple[str, str], soft_tokens: int) -> tuple[list[int], int]:
        """(token ids of a prompt with an image, position of its first soft token). Soft tokens have placeholder ids.

        texts: before and after the image; each is encoded separately, so its tokens do not depend on the image.
        """
        before = self.prompt(texts[0])
        return [*before, *[self.placeholder] * soft_tokens, *self.text(texts[1])], len(before)

    @cached_property
    def placeholder(self) -> int:
        """The id at a soft token's position: the last id before added tokens, which is rare in answers.

        A repetition penalty counts it as a token of the prompt.
        """
        added = self.tokenizer.added_tokens_decoder
        return max(token_id for token_id in self.tokenizer.get_vocab().values() if token_id not in added)

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """The special tokens that the backbone's tokenizer puts before a text."""
        whole, bare = self._plain("a", True), self._plain("a", False)
        begin = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
        return tuple(whole[:begin])

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, and of the chat template's marks that are tokens."""
        added = self.tokenizer.added_tokens_decoder.items()
        named = {token_id for token_id, token in added if token.special or token.content in self._reserved}
        return frozenset(named | set(getattr(self.tokenizer, "all_special_ids", ())))

    def working_tokens(self, ids: Sequence[int], working: str) -> int:
        """How many of the first generated ids belong to the working."""
        size, tokens = len(working.encode()), 0
        while size > 0 and tokens < len(ids):
            size -= self._byte_lengths.get(ids[tokens], 0)
            tokens += 1
        return tokens

    @cached_property
    def _byte_lengths(self) -> dict[int, int]:
        """Bytes of each token in a text; special tokens have none."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        steps = _steps(getattr(backend, "pre_tokenizer", None), "pretokenizers")
        # A ByteLevel tokenizer spells a token with one character for each byte.
        length = len if any(step["type"] == "ByteLevel" for step in steps) else _length_with_fallback
        lengths = {token_id: length(token) for token, token_id in self.tokenizer.get_vocab().items()}
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            lengths[token_id] = len(token.content.encode())
        return lengths | dict.fromkeys(self.special_ids, 0)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation in the backbone's chat template, ready for the assistant's turn. Raises TemplateError.

        The template writes special tokens as text, so contents must not contain any: see `reserved_in`.
        """
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return str(text)

    def chat(self, rendered: str) -> list[int]:
        """Token ids of the result of `render_chat`."""
        return self._with_special(rendered, False)

    def text(self, text: str) -> list[int]:
        """Token ids of a text alone, as plain text."""
        return self._plain(text, False)

    def decoded(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens. Some tokenizers drop a blank before it."""
        return str(self._decode(ids, skip_special_tokens=True))

    @cached_property
    def _decode(self) -> Callable[..., str]:
        decode: Callable[..., str] = getattr(self.tokenizer, "backend_tokenizer", self.tokenizer).decode
        return decode

    def answer(self, target: str) -> list[int]:
        """Token ids that a model should generate after the prompt: a blank, the answer, the end-of-sequence token.

        Encodes the answer separately from the prompt: at inference the prompt is encoded alone, too.
        """
        return [*self.text(" " + target), self.tokenizer.eos_token_id]

    def example(
        self,
        task: TaskSpec,
        text: str,
        target: str,
        working: str | None = None,
        *,
        document_ids: MutableMapping[str, list[int]] | None = None,
    ) -> tuple[list[int], int, list[int]]:
        """(prompt ids, activation point, answer ids) of one training example; the answer includes its working.

        document_ids: a cache of encoded document parts; this example's part is added.
        """
        parts, known = task.parts(text), None
        if document_ids is not None and parts.document:
            if parts.document not in document_ids:
                document_ids[parts.document] = self.prompt(parts.document)
            known = document_ids[parts.document]
        return *self.parts(parts, known), self.answer(task.worked_answer(working, target))

    def reserved_in(self, text: str) -> list[str]:
        """Reserved texts in a chat's content, as written or after the tokenizer's normalization.

        Reserved: every special token, and the bracketed marks that the chat template puts around turns.
        """
        texts = [text] if self._normalize is None else [text, self._normalize(text)]
        if not any(start in each for start in self._reserved_starts for each in texts):
            return []
        return [token for token in self._reserved if any(token in each for each in texts)]

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of a text's tokens, without encoding it; 0 where the tokenizer may drop parts of a text."""
        return math.ceil(len(text.encode().translate(None, self._dropped_bytes)) / self._most_bytes_per_token)


def _length_with_fallback(token: str) -> int:
    """Bytes of a token of a tokenizer that writes blanks as U+2581, and bytes without a token as <0x0A>."""
    return 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())


def _encode_with(tokenizer: Any, *, split_special_tokens: bool) -> _Encode:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # Tokenizers in Python take the mode as an argument of each call.
        return lambda text, outer: list(
            tokenizer(text, add_special_tokens=outer, split_special_tokens=split_special_tokens)["input_ids"]
        )
    own = copy.deepcopy(backend)
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = split_special_tokens
    # Same result as `tokenizer(text)` without its overhead per request.
    return lambda text, outer: list(own.encode_batch_fast([text], add_special_tokens=outer)[0].ids)


def _normalizer(tokenizer: Any) -> Callable[[str], str] | None:
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    return None if normalizer is None else normalizer.normalize_str


def _reserved(tokenizer: Any, normalize: Callable[[str], str] | None) -> tuple[str, ...]:
    found = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    found |= {*tokenizer.all_special_tokens, *_marks(tokenizer)}
    if normalize is not None:
        found |= {normalize(text) for text in found}
    return tuple(sorted(found - {""}))


def _marks(tokenizer: Any) -> Iterator[str]:
    """The template's marks around turns, found in conversations with and without a system message."""
    from jinja2 import TemplateError

    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    for messages in ([{"role": "system", "content": "x"}, *turns], turns):
        try:
            yield from _MARK.findall(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:
            # Some templates refuse a system message.
            continue


def _token_bytes(tokenizer: Any) -> tuple[float, bytes]:
    """(most bytes of a text that one token covers, bytes that may be dropped); infinity without a bound."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return math.inf, b""
    pre_tokenizers, vocabulary = list(_steps(backend.pre_tokenizer, "pretokenizers")), backend.get_vocab()
    byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizers)
    if (
        not (byte_level or backend.model.byte_fallback)
        or not all(map(_keeps_all, pre_tokenizers))
        or any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    ):
        return math.inf, b""
    names = bytes_to_unicode() if byte_level else {byte: f"<0x{byte:02X}>" for byte in range(256)}
    shrinks = math.prod(map(_normalizer_shrinks, _steps(backend.normalizer, "normalizers")))
    longest = max(len(token.encode()) for token in vocabulary)
    return shrinks * longest, bytes(byte for byte, name in names.items() if name not in vocabulary)


def _steps(component: Any, parts: str) -> Iterator[dict[str, Any]]:
    """The descriptions of a backend's normalizers or pre-tokenizers, sequences resolved."""
    found = [] if component is None else [json.loads(component.__getstate__())]
    while found:
        step = found.pop(0)
        if step["type"] == "Sequence":
            found = [*step[parts], *found]
        else:
            yield step


def _normalizer_shrinks(step: Mapping[str, Any]) -> float:
    match step:
        case {"type": "NFC"}:
            return _NFC_SHRINKS
        case {"type": "Prepend"}:
            return 1
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return max(1.0, len(old.encode()) / len(new.encode())) if new else math.inf
        case _:
            return math.inf


def _keeps_all(pre_tokenizer: Mapping[str, Any]) -> bool:
    return pre_tokenizer["type"] in _LOSSLESS_PRE_TOKENIZERS or (
        pre_tokenizer["type"] == "Split" and pre_tokenizer["behavior"] != "Removed"
    )
