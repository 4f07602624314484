"""A vocabulary's tokens as bytes, and rows of bits that say which may come next."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import numpy.typing as npt

# Bits of allowed tokens, 32 to a word, as vLLM's structured outputs pass them.
Row = npt.NDArray[np.int32]

# Bytes of rows that are kept.
_KEPT_BYTES = 64 << 20
# Longer tokens, in bytes, such as rows of blanks, occur in no typed answer.
LONGEST_TOKEN = 32


class Vocabulary:
    """The vocabulary of one tokenizer. `size` may exceed the tokenizer's own: embeddings are padded."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.size = size = max(size, len(tokenizer))
        self.matchers = llguidance.hf.from_tokenizer(tokenizer, size)
        known = len(tokenizer)
        special = [token >= known or self.matchers.is_special_token(token) for token in range(size)]
        self.texts = [b"" if special[token] else self.matchers.decode_bytes([token]) for token in range(size)]
        self.ids = {text: token for token, text in enumerate(self.texts) if text}
        self.eos = int(tokenizer.eos_token_id)
        # All tokens but special ones.
        self.ordinary = self.row(lambda text: bool(text))
        self.short = self.row(lambda text: 0 < len(text) <= LONGEST_TOKEN)
        self._kept: OrderedDict[Any, Row] = OrderedDict()
        self._most_kept = max(1, _KEPT_BYTES // self.ordinary.nbytes)
        self._lock = threading.Lock()
        # Cache marks: many tasks share a set, and each set takes a pass over the vocabulary.
        self.marks = lru_cache(maxsize=1024)(self._marks)
        self._encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)

    def kept(self, key: Any) -> Row | None:
        """A row that was kept."""
        return self._kept.get(key)

    def keep(self, key: Any, row: Row) -> Row:
        """Keep a row, and drop the oldest one beyond what is kept."""
        with self._lock:
            self._kept[key] = row
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        return row

    def row(self, allows: Callable[[bytes], bool]) -> Row:
        """The row of the tokens whose bytes `allows` takes."""
        return self._packed(np.fromiter(map(allows, self.texts), dtype=bool, count=self.size))

    def row_of(self, tokens: Iterable[int]) -> Row:
        """The row of these tokens."""
        bits = np.zeros(self.size, dtype=bool)
        bits[list(tokens)] = True
        return self._packed(bits)

    def tokens_of(self, row: Row, most: int) -> list[int] | None:
        """The tokens of a row, or None if there are more than `most`."""
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")[: self.size]
        found = np.flatnonzero(bits)
        return None if len(found) > most else found.tolist()

    def _marks(self, marks: tuple[str, ...], ends: bool) -> "Marks":
        return Marks(self, marks, ends=ends)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._encode(text)

    def _packed(self, bits: npt.NDArray[np.bool_]) -> Row:
        padded = np.zeros(-(-self.size // 32) * 32, dtype=bool)
        padded[: self.size] = bits
        return np.packbits(padded, bitorder="little").view(np.int32)


class Marks:
    """Finds texts, the marks, in what is decoded, and knows the tokens that would complete one."""

    def __init__(self, vocabulary: Vocabulary, marks: Iterable[str], *, ends: bool) -> None:
        """ends: find only tokens that complete a mark and continue after it."""
        self._vocabulary = vocabulary
        self._marks = [mark.encode() for mark in marks]
        self._ends = ends
        self.row = lru_cache(maxsize=256)(self._row)
        # Make the rows before a request needs them.
        for begun in ((), *(((i, size),) for i, mark in enumerate(self._marks) for size in range(1, len(mark)))):
            self.row(begun)

    def begun(self, tail: bytes) -> tuple[tuple[int, int], ...]:
        """(mark, bytes of it) of every mark that the end of a text begins."""
        return tuple(
            (i, size)
            for i, mark in enumerate(self._marks)
            for size in range(1, len(mark))
            if tail.endswith(mark[:size])
        )

    def _row(self, begun: tuple[tuple[int, int], ...]) -> Row:
        """Return the row of tokens that complete a mark, given the marks that have begun."""
        begins = [(b"", mark) for mark in self._marks] + [(self._marks[i][:size], self._marks[i]) for i, size in begun]

        def completes(text: bytes) -> bool:
            for before, mark in begins:
                at = (before + text).find(mark)
                if at >= 0 and (not self._ends or at + len(mark) < len(before) + len(text)):
                    return True
            return False

        return self._vocabulary.row(completes)
