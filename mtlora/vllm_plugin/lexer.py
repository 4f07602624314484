"""The tokens that llguidance allows next, within bounds of time and memory.

llguidance does not raise an error when its lexer is full: its masks are then empty, for all copies of the matcher. So
this module replaces a full lexer, and pauses a type that fills the largest lexer within a few masks.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from mtlora.answer.language import Expression, pattern
from mtlora.vllm_plugin.vocabulary import Row, Vocabulary

# Initial and largest number of a lexer's states, 400 bytes each. The largest of a dozen ordinary types takes 7,000.
_FEW, _MOST = 2_500, 20_000
# If a lexer is full after fewer masks, wait before making another one.
_WORTHWHILE = 100
_REST_S = 10.0


class Lexer:
    """The lexer of one type, which all its sequences share. `states`: the most that it may hold."""

    def __init__(self, expression: Expression, vocabulary: Vocabulary) -> None:
        """Raises ValueError where llguidance refuses the type, or knows no first token within its limits."""
        self.vocabulary = vocabulary
        self.states = _FEW
        self._grammar = llguidance.grammar_from("regex", pattern(expression))
        self._lock = threading.Lock()
        self._resting_until = 0.0
        self._masks = 0
        self._whole: Any = self._matcher()
        walk = Walk(self)
        if walk.row(()) is None:
            raise ValueError(f"too complex: {walk.error.partition(chr(10))[0]}")

    def whole(self) -> Any:
        """The matcher to copy, or None while the type rests."""
        with self._lock:
            if self._whole is None and time.monotonic() >= self._resting_until:
                self._whole = self._matcher()
            return self._whole

    def used(self) -> None:
        """Count a mask."""
        self._masks += 1

    def replace(self, failed: Any) -> None:
        """Replace a failed lexer, unless another sequence already did or the type is paused."""
        with self._lock:
            if failed is not self._whole:
                return
            if self.states < _MOST:
                self.states = min(2 * self.states, _MOST)
            elif self._masks < _WORTHWHILE:
                self._whole, self._resting_until = None, time.monotonic() + _REST_S
                return
            self._whole = self._matcher()

    def _matcher(self) -> Any:
        self._masks = 0
        limits = llguidance.LLParserLimits(max_lexer_states=self.states, verbose_errors=False)
        return llguidance.LLMatcher(self.vocabulary.matchers, self._grammar, log_level=0, limits=limits)


class Walk:
    """One sequence's way through a type."""

    def __init__(self, lexer: Lexer) -> None:
        self._lexer = lexer
        self.error = ""
        self.restart()

    def restart(self) -> None:
        """Forget the tokens read: some were taken back."""
        self._whole: Any = None
        self._matcher: Any = None
        self._read = 0

    def row(self, tokens: Sequence[int]) -> Row | None:
        """The tokens that may follow these; None where llguidance cannot say.

        Only what comes after the tokens of the last call is read.
        """
        lexer = self._lexer
        while self._matcher or self._begin():
            self._matcher.consume_tokens(list(tokens[self._read :]))
            self._read = len(tokens)
            row = np.zeros((1, len(lexer.vocabulary.short)), dtype=np.int32)
            llguidance.numpy.fill_next_token_bitmask(self._matcher, row, 0)
            if not self._matcher.is_error():
                lexer.used()
                found: Row = row[0] & lexer.vocabulary.short
                return found
            self.error = self._matcher.get_error()
            lexer.replace(self._whole)
            self.restart()
        return None

    def _begin(self) -> bool:
        self._whole = self._lexer.whole()
        if self._whole is not None:
            self._matcher = self._whole.deep_copy()
        return self._matcher is not None
