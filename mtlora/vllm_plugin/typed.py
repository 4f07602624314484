"""Constrains answers to their task's type while vLLM decodes them.

A request carries a constraint (`mtlora.answer.constraint`) as the grammar of its structured output. The engine core
keeps the compiled form of each. Working before an answer marker is free text. The marker ends it (or an answer without
working); the marker is forced while the answer still fits in `max_tokens`. Within the answer, llguidance gives the
allowed tokens; when few tokens are left, only those that leave enough tokens to end the answer.
"""

import itertools
import json
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from mtlora.answer.constraint import PREFIX, TOKENS_PREFIX, Constraint, read
from mtlora.answer.language import States
from mtlora.vllm_plugin.closing import Closing
from mtlora.vllm_plugin.lexer import Lexer, Walk
from mtlora.vllm_plugin.vocabulary import Row, Vocabulary

# Compiled constraints kept, by their size in states of about a kilobyte: of tasks, and of requests. Running sequences
# hold theirs beyond that.
_TASKS_STATES, _REQUESTS_STATES = 1_500_000, 500_000
# States of a lexer that take as much memory as one of an automaton.
_PER_STATE = 2
_numbers = itertools.count()
# When tokens run short, try up to this many candidates one by one.
_TRIED = 512


class Compiled:
    """A constraint for one vocabulary."""

    def __init__(self, constraint: Constraint, vocabulary: Vocabulary) -> None:
        """Raises AnswerError, or ValueError where llguidance refuses the type."""
        self.vocabulary = vocabulary
        self.automaton = constraint.compile()
        self.closing = Closing(self.automaton, vocabulary)
        self.marker = constraint.marker.encode() if constraint.marker else b""
        self.marker_tokens = vocabulary.encode(f" {constraint.marker}") if constraint.marker else []
        self.stops = vocabulary.marks(constraint.stop if constraint.marker else (), False)
        self.markers = vocabulary.marks((constraint.marker,) if constraint.marker else (), True)
        # Tells this constraint's rows from those of others in the vocabulary.
        self._number = next(_numbers)
        self.lexer = Lexer(constraint.expression, vocabulary)

    @property
    def size(self) -> int:
        """The automaton's states, plus other memory converted to states."""
        return self.automaton.size + self.lexer.states // _PER_STATE

    @property
    def fewest_with_marker(self) -> int:
        """`fewest`, plus the marker's tokens."""
        return self.fewest + len(self.marker_tokens)

    @property
    def fewest(self) -> int:
        """Tokens that a shortest answer takes, with the end-of-sequence token."""
        return self.closing.needs(self.automaton.start) + 1

    def row(self, key: Any) -> Row | None:
        """A row kept for a state."""
        return self.vocabulary.kept((self._number, key))

    def keep(self, key: Any, row: Row) -> Row:
        """Keep a row for a state."""
        return self.vocabulary.keep((self._number, key), row)


@dataclass(frozen=True)
class _Place:
    """A sequence's position in its constraint.

    left: tokens that it may still have. tail: the last bytes of the working. whole: the states of an answer without
    working, as far as the text is one. answer: the states of the answer, once it has begun. forced: tokens to come.
    """

    left: int
    tail: bytes = b""
    whole: States = frozenset()
    answer: States | None = None
    forced: tuple[int, ...] = ()
    ended: bool = False


class TypedGrammar(StructuredOutputGrammar):
    """One sequence's way through its constraint."""

    def __init__(self, compiled: Compiled, left: int, ends: frozenset[int]) -> None:
        """left: tokens that the sequence may have. ends: ids that end it."""
        self._compiled = compiled
        self._ends = ends
        start = compiled.automaton.start
        if compiled.marker:
            self._places = [self._in_time(_Place(left, whole=start))]
        else:
            self._places = [_Place(left, answer=start)]
        self._answer: list[int] = []
        self._walk = Walk(compiled.lexer)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """See StructuredOutputGrammar."""
        return all(map(self._accept, tokens))

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """See StructuredOutputGrammar."""
        accepted = 0
        for token in tokens:
            # Tokens after an end do not count.
            if self.is_terminated() or not self._accept(token):
                break
            accepted += 1
        self.rollback(accepted)
        return tokens[:accepted]

    def rollback(self, num_tokens: int) -> None:
        """See StructuredOutputGrammar."""
        for _ in range(num_tokens):
            dropped = self._places.pop()
            # An end is no token of the answer.
            if self._places[-1].answer is not None and not dropped.ended:
                self._answer.pop()
        self._walk.restart()

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """See StructuredOutputGrammar."""
        row = self._row()
        bitmask[batch_index].numpy()[: len(row)] = row

    def is_terminated(self) -> bool:
        """See StructuredOutputGrammar."""
        return self._places[-1].ended

    def reset(self) -> None:
        """See StructuredOutputGrammar."""
        self.rollback(len(self._places) - 1)

    def _accept(self, token: int) -> bool:
        before, compiled = self._places[-1], self._compiled
        if before.ended:
            return True
        after = replace(before, left=before.left - 1)
        if token in self._ends:
            states = before.whole if before.answer is None else before.answer
            if not compiled.automaton.accepts(states):
                return False
            self._places.append(replace(after, ended=True))
            return True
        text = compiled.vocabulary.texts[token]
        if before.answer is not None:
            answer = compiled.automaton.read(before.answer, text)
            if not answer or not text:
                return False
            self._answer.append(token)
            self._places.append(replace(after, answer=answer))
            return True
        forced = before.forced[1:] if before.forced[:1] == (token,) else ()
        _, found, rest = (before.tail + text).partition(compiled.marker)
        if found:
            # A marker always ends its token: masks forbid tokens that continue after it.
            if rest:
                return False
            self._places.append(_Place(after.left, answer=compiled.automaton.start))
            return True
        kept = (before.tail + text)[-max(64, len(compiled.marker)) :]
        whole = compiled.automaton.read(before.whole, text)
        self._places.append(self._in_time(replace(after, tail=kept, forced=forced, whole=whole)))
        return True

    def _in_time(self, place: _Place) -> _Place:
        """Force the marker once the tokens left hold only the marker and a shortest answer."""
        # Reserve only the shortest answer: reserving more would cut working although its answer still fits.
        if not place.forced and place.left - 1 < self._compiled.fewest_with_marker:
            return replace(place, forced=tuple(self._compiled.marker_tokens))
        return place

    def _row(self) -> Row:
        place = self._places[-1]
        return self._row_of_working(place) if place.answer is None else self._row_of_answer(place, place.answer)

    def _row_of_working(self, place: _Place) -> Row:
        compiled = self._compiled
        if place.forced:
            return compiled.vocabulary.row_of(place.forced[:1])
        stops, markers = compiled.stops.begun(place.tail), compiled.markers.begun(place.tail)
        may_end = compiled.automaton.accepts(place.whole)
        key = (stops, markers, may_end and self._ends)
        row = compiled.row(key)
        if row is None:
            row = compiled.vocabulary.ordinary & ~compiled.stops.row(stops) & ~compiled.markers.row(markers)
            row = compiled.keep(key, row | self._end_row if may_end else row)
        return row

    def _row_of_answer(self, place: _Place, answer: States) -> Row:
        compiled = self._compiled
        enough = compiled.closing.worst(answer) <= place.left - 2
        key = (answer, self._ends, None if enough else place.left)
        row = compiled.row(key)
        if row is None:
            # Rows that were kept for a state need no walk, so it may lie behind.
            row = self._walk.row(self._answer)
            if row is None:
                return self._closing_row(answer)
            if compiled.automaton.accepts(answer):
                row = row | self._end_row
            row = compiled.keep(key, row if enough else self._short_row(row, answer, place.left))
        return row

    def _closing_row(self, answer: States) -> Row:
        """The end, or the token that comes closer to it."""
        compiled = self._compiled
        if compiled.automaton.accepts(answer):
            return self._end_row
        return compiled.vocabulary.row_of([compiled.closing.next(answer)])

    def _short_row(self, row: Row, answer: States, left: int) -> Row:
        """The tokens of a row after which an end still fits in `left` tokens."""
        vocabulary, automaton, closing = (
            self._compiled.vocabulary,
            self._compiled.automaton,
            self._compiled.closing,
        )
        fitting = [
            token
            for token in vocabulary.tokens_of(row, _TRIED) or ()
            if token in self._ends
            or ((after := automaton.read(answer, vocabulary.texts[token])) and closing.needs(after) <= left - 2)
        ]
        return vocabulary.row_of(fitting) if fitting else self._closing_row(answer)

    @cached_property
    def _end_row(self) -> Row:
        return self._compiled.vocabulary.row_of(self._ends)


class OneOf(StructuredOutputGrammar):
    """Holds a sequence's tokens to one set; for sequences of one token."""

    def __init__(self, row: Row) -> None:
        self._allowed = row

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """See StructuredOutputGrammar."""
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """See StructuredOutputGrammar."""
        return tokens

    def rollback(self, num_tokens: int) -> None:
        """See StructuredOutputGrammar."""

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """See StructuredOutputGrammar."""
        bitmask[batch_index].numpy()[: len(self._allowed)] = self._allowed

    def is_terminated(self) -> bool:
        """See StructuredOutputGrammar."""
        return False

    def reset(self) -> None:
        """See StructuredOutputGrammar."""


class _Kept:
    """The compiled constraints used last, up to a size."""

    def __init__(self, states: int) -> None:
        self._states = states
        self._all: OrderedDict[str, Compiled] = OrderedDict()

    def __contains__(self, text: str) -> bool:
        return text in self._all

    def get(self, text: str) -> Compiled | None:
        if text in self._all:
            self._all.move_to_end(text)
        return self._all.get(text)

    def add(self, text: str, made: Compiled) -> Compiled:
        """Keep it, or what is kept already, and drop the oldest beyond the size."""
        made = self._all.setdefault(text, made)
        # Recompute sizes, because they grow with use.
        states = sum(each.size for each in self._all.values())
        while states > self._states and len(self._all) > 1:
            _, dropped = self._all.popitem(last=False)
            states -= dropped.size
        return made


class TypedOutputs:
    """The compiled constraints of one engine core."""

    def __init__(self, tokenizer: Any, vocabulary_size: int) -> None:
        self.vocabulary = Vocabulary(tokenizer, vocabulary_size)
        # Separate caches, so that requests' own types do not evict tasks' types.
        self._of_tasks, self._of_requests = _Kept(_TASKS_STATES), _Kept(_REQUESTS_STATES)
        self._lock = threading.Lock()

    def compiled(self, text: str, *, of_task: bool = False) -> Compiled:
        """The compiled form of a constraint; made where it is not kept. Raises AnswerError or ValueError."""
        with self._lock:
            found = self._of_tasks.get(text)
            if found is None:
                found = self._of_requests.get(text)
                if found is not None and of_task:
                    self._of_tasks.add(text, found)
        if found is not None:
            return found
        made = Compiled(read(text), self.vocabulary)
        with self._lock:
            return (self._of_tasks if of_task else self._of_requests).add(text, made)

    def has(self, text: str) -> bool:
        """Whether a sequence's grammar can be made at once."""
        return text in self._of_tasks or text in self._of_requests or text.startswith(TOKENS_PREFIX)

    def grammar(self, text: str, left: int, ends: set[int] | None) -> StructuredOutputGrammar:
        """A sequence's grammar. Raises ValueError where `left` tokens hold no answer."""
        if text.startswith(TOKENS_PREFIX):
            return OneOf(self.vocabulary.row_of(json.loads(text.removeprefix(TOKENS_PREFIX))))
        compiled = self.compiled(text)
        if left < compiled.fewest_with_marker:
            raise ValueError(f"an answer takes {compiled.fewest_with_marker} tokens at least; {left} are left")
        return TypedGrammar(compiled, left, frozenset(ends or {self.vocabulary.eos}))


_checked = SamplingParams._validate_structured_outputs
_begun = StructuredOutputManager.grammar_init


def hold_answers_to_types() -> None:
    """Take the seam "typed answers" in this process."""
    from vllm.v1.engine.core import EngineCore

    SamplingParams._validate_structured_outputs = _check
    StructuredOutputManager.grammar_init = _grammar_init
    EngineCore.mtlora_compile = _compile


def constraint_of(parameters: Any) -> str | None:
    """The constraint that a request's SamplingParams carry."""
    outputs = parameters.structured_outputs if parameters is not None else None
    text = outputs.grammar if outputs is not None else None
    return text if text is not None and text.startswith((PREFIX, TOKENS_PREFIX)) else None


def _check(self: Any, model_config: Any, structured_outputs_config: Any, tokenizer: Any) -> None:
    """Skip vLLM's check for constraints, which were checked when made: vLLM would parse them as grammars."""
    if constraint_of(self) is None:
        _checked(self, model_config, structured_outputs_config, tokenizer)
    else:
        backend = structured_outputs_config.backend
        self.structured_outputs._backend = "guidance" if backend == "auto" else backend


def _grammar_init(self: Any, request: Any) -> None:
    """Take a compiled constraint at once: a request that waits for its grammar misses a step."""
    text = constraint_of(request.sampling_params)
    if text is None:
        return _begun(self, request)
    left = min(request.max_tokens, self.vllm_config.model_config.max_model_len - request.num_prompt_tokens)
    ends = request.sampling_params.all_stop_token_ids
    outputs: TypedOutputs | None = getattr(self, "_mtlora_outputs", None)
    if outputs is not None and outputs.has(text):
        grammar = outputs.grammar(text, left, ends)
    else:
        grammar = self.executor.submit(lambda: _outputs(self).grammar(text, left, ends))
    request.structured_output_request.grammar = grammar
    return None


def _compile(self: Any, texts: list[str], of_tasks: bool) -> "Future[list[int]]":
    """Compile constraints beside the running steps, before a request needs them; gives the fewest tokens of each."""
    manager = self.structured_output_manager
    future: Future[list[int]] = manager.executor.submit(
        lambda: [_outputs(manager).compiled(text, of_task=of_tasks).fewest_with_marker for text in texts]
    )
    return future


_making = threading.Lock()


def _outputs(manager: Any) -> TypedOutputs:
    with _making:
        if not hasattr(manager, "_mtlora_outputs"):
            config = manager.vllm_config
            made = TypedOutputs(manager.tokenizer, config.model_config.get_vocab_size())
            if manager._grammar_bitmask is None:
                # vLLM's backends make the bitmask, and none exists yet.
                rows = config.scheduler_config.max_num_seqs * (1 + config.num_speculative_tokens)
                manager._grammar_bitmask = torch.full((rows, len(made.vocabulary.ordinary)), -1, dtype=torch.int32)
            manager._mtlora_outputs = made
    outputs: TypedOutputs = manager._mtlora_outputs
    return outputs
