"""How many tokens an answer still needs, so that it can end in time.

Legend: states are those of an `Automaton`; a token is an id of the vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from mtlora.answer.language import Automaton, States
from mtlora.vllm_plugin.vocabulary import LONGEST_TOKEN, Vocabulary

# Longest part of a shortest path, in bytes, that is tried as one token.
_LONGEST_STRIDE = 12


class Closing:
    """The tokens to an answer's end from each state of an automaton, along one shortest way.

    A vocabulary has a token for every byte, so a path always exists.
    """

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary) -> None:
        bytes_left, way = automaton.ways_out()
        self._needs = needs = [0] * len(way)
        self._strides: list[tuple[int, int]] = [(-1, 0)] * len(way)
        for state in sorted(range(len(way)), key=bytes_left.__getitem__):
            best, text, at = None, b"", state
            while len(text) < _LONGEST_STRIDE and (step := way[at]):
                text, at = text + bytes((step[0],)), step[1]
                token = vocabulary.ids.get(text)
                if token is not None and (best is None or needs[at] + 1 < best):
                    best = needs[state] = needs[at] + 1
                    self._strides[state] = token, at
            if best is None and way[state]:
                raise ValueError(f"the vocabulary has no token for the byte {way[state]}")
        self._worst = _worst(automaton, needs)

    def needs(self, states: States) -> int:
        """Return the fewest tokens from these states to the end, without the end-of-sequence token."""
        needs = self._needs
        return min(needs[state] for state in states)

    def worst(self, states: States) -> int:
        """The most that `needs` may be after one more token, whichever token that is."""
        worst = self._worst
        return max(worst[state] for state in states)

    def next(self, states: States) -> int:
        """The token that comes one step closer to the end; call it where the answer needs one."""
        return self._strides[min(states, key=self._needs.__getitem__)][0]


def _worst(automaton: Automaton, needs: list[int]) -> list[int]:
    byte_steps = np.array(
        [(state, target) for state, edges in enumerate(automaton.edges) for _, _, target in edges], dtype=np.int64
    ).reshape(-1, 2)
    empty_steps = _last_first(automaton.empty)
    # The most `needs` after a number of bytes; -1 if no text has that many.
    after = np.array(needs, dtype=np.int64)
    worst = np.full(len(needs), -1, dtype=np.int64)
    for _ in range(LONGEST_TOKEN):
        before, after = after, np.full(len(needs), -1, dtype=np.int64)
        np.maximum.at(after, byte_steps[:, 0], before[byte_steps[:, 1]])
        reached: list[int] = after.tolist()
        changed = True
        # One pass is enough, unless repetitions nest.
        while changed:
            changed = False
            for state, target in empty_steps:
                if reached[target] > reached[state]:
                    reached[state] = reached[target]
                    changed = True
        after = np.array(reached, dtype=np.int64)
        worst = np.maximum(worst, after)
    found: list[int] = worst.tolist()
    return found


def _last_first(empty: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Empty transitions (state, target), sorted so that transitions from the target come first.

    For cycles, which have no such order, the order is that of a depth-first search.
    """
    steps, seen = [], [False] * len(empty)
    for first in range(len(empty)):
        stack = [] if seen[first] else [(first, iter(empty[first]))]
        seen[first] = True
        while stack:
            state, targets = stack[-1]
            for target in targets:
                if not seen[target]:
                    seen[target] = True
                    stack.append((target, iter(empty[target])))
                    break
            else:
                stack.pop()
                steps += [(state, target) for target in empty[state]]
    return steps
