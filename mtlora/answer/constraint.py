"""A constraint makes a decoder keep to a type. It is one text: sent with a request, and the key of a cache."""

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
# Prefix that tells a constraint from other grammars in vLLM's requests.
PREFIX = "mtlora:"
# Prefix of a list of token ids that the next token must come from.
TOKENS_PREFIX = "mtlora-tokens:"


@dataclass(frozen=True)
class Constraint:
    """An answer's type, the marker between working and answer (if any), and strings that must not occur."""

    type: AnswerType
    marker: str | None = None
    stop: tuple[str, ...] = ()

    @cached_property
    def text(self) -> str:
        """The constraint as text; `read` gives it back."""
        return PREFIX + json.dumps([_TYPES.dump_json(self.type).decode(), self.marker, self.stop], ensure_ascii=False)

    @cached_property
    def expression(self) -> Expression:
        """The expression to decode after the marker: an answer, with or without a blank before it."""
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
    """The text that restricts one token to a set; log-probabilities are then relative to the set."""
    return TOKENS_PREFIX + json.dumps(list(tokens))


def checked(
    data: Mapping[str, Any], marker: str | None, stop: tuple[str, ...], limit: int
) -> Iterator[tuple[str, str]]:
    """The text of a constraint, and its type's name. Raises AnswerError for an invalid or too large type.

    Runs in a child process that imports only this module.
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
