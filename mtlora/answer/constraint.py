"""What holds a decoder to a type: one text, which travels with a request and names the compiled form in a cache."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mtlora.answer import language
from mtlora.answer.language import AnswerError, Automaton, Expression
from mtlora.answer.types import AnswerType
from mtlora.errors import describe

_TYPES: TypeAdapter[AnswerType] = TypeAdapter(AnswerType)
# Marks a constraint among the grammars that vLLM's requests carry.
PREFIX = "mtlora:"
# Stands before a list of token ids: the next token is one of them.
TOKENS_PREFIX = "mtlora-tokens:"


@dataclass(frozen=True)
class Constraint:
    """An answer's type, the marker before the answer if there is working, and strings that occur nowhere."""

    type: AnswerType
    marker: str | None = None
    stop: tuple[str, ...] = ()

    @cached_property
    def text(self) -> str:
        """The constraint as text; `read` gives it back."""
        return PREFIX + json.dumps([_TYPES.dump_json(self.type).decode(), self.marker, self.stop], ensure_ascii=False)

    @cached_property
    def expression(self) -> Expression:
        """What is decoded after the marker: an answer after a blank, as trained answers have it, or without."""
        return language.sequence(language.optional(language.literal(" ")), self.type.expression)

    def compile(self, limit: int = language.MAX_STATES) -> Automaton:
        """The automaton of `expression`. Raises AnswerError where an answer may contain a stop string."""
        language.check_written(self.expression)
        automaton = Automaton(self.expression, limit)
        for stop in self.stop:
            if automaton.may_contain(stop):
                raise AnswerError(f"{self.type.type}: an answer may contain the stop string {stop!r}")
        return automaton


def next_token(tokens: Sequence[int]) -> str:
    """The text that holds one token to a set: its log-probabilities are then those within the set."""
    return TOKENS_PREFIX + json.dumps(list(tokens))


def checked(
    data: Mapping[str, Any], marker: str | None, stop: tuple[str, ...], limit: int
) -> Iterator[tuple[str, str]]:
    """The text of a constraint, and its type's name. Raises AnswerError for data of no type, or of too large a one.

    For a child process, which imports this module alone.
    """
    try:
        constraint = Constraint(_TYPES.validate_python(data), marker, stop)
        constraint.compile(limit)
    except ValidationError as error:
        raise AnswerError(describe(error)) from None
    yield constraint.text, constraint.type.name


def read(text: str) -> Constraint:
    """The constraint of `Constraint.text`. Raises ValueError for any other text."""
    kind, marker, stop = json.loads(text.removeprefix(PREFIX))
    return Constraint(_TYPES.validate_json(kind), marker, tuple(stop))
