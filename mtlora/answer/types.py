"""Types of answers, as fields of a task's entry and of a request.

Each type has an `expression` that constrains the decoder, and converts an answer's text into a value.
"""

import json
from datetime import date, datetime
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mtlora.answer import grammar, language, numbers, regex, schema
from mtlora.answer.language import AnswerError, Automaton, Expression

MAX_LABELS = 1000
MAX_LABEL_CHARACTERS = 64_000

Value = str | Decimal | date | dict[str, Any] | list[Any] | float | bool | None


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def expression(self) -> Expression:
        """The expression of all answers, without outer blanks. Raises AnswerError."""
        raise NotImplementedError

    @cached_property
    def automaton(self) -> Automaton:
        """The automaton of `expression`. Raises AnswerError if it is too large."""
        return _automaton(self.expression)

    @property
    def name(self) -> str:
        """The type's name for clients, which tells them how to convert a text into a value."""
        return str(self.type)  # type: ignore[attr-defined]

    def check(self, text: str) -> bool:
        """Whether the text, without outer blanks, is an answer of this type."""
        return self.automaton.matches(text.strip())

    def value(self, text: str) -> Value:
        """The value of an answer's text. Raises AnswerError for a text that is not of this type."""
        if not self.check(text):
            raise AnswerError(f"{text[:80]!r} is not an answer of this type")
        return self._value(text.strip())

    def _value(self, text: str) -> Value:
        return text

    @model_validator(mode="after")
    def _has_answers(self) -> "_Answer":
        try:
            _ = self.expression
        except AnswerError as error:
            raise ValueError(str(error)) from None
        return self


@lru_cache(maxsize=256)
def _automaton(expression: Expression) -> Automaton:
    return Automaton(expression)


class Label(_Answer):
    """One label of a closed set."""

    type: Literal["label"] = "label"
    labels: tuple[str, ...] = Field(description=f"2 to {MAX_LABELS} distinct, non-empty answers")

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if not 2 <= len(labels) <= MAX_LABELS:
            raise ValueError(f"found {len(labels)} labels; allowed: 2 to {MAX_LABELS}")
        if len(set(labels)) != len(labels) or "" in labels:
            raise ValueError("labels must be distinct and not empty")
        if blank := next((label for label in labels if label != label.strip()), None):
            raise ValueError(f"{blank!r} begins or ends with a blank")
        if (found := sum(map(len, labels))) > MAX_LABEL_CHARACTERS:
            raise ValueError(f"found {found} characters in all; allowed: {MAX_LABEL_CHARACTERS}")
        return labels

    @cached_property
    def expression(self) -> Expression:
        return language.choice(self.labels)


class Number(_Answer):
    """A multiple of `step` in a range, in decimal digits."""

    type: Literal["number"] = "number"
    minimum: Decimal = -numbers.WIDEST
    maximum: Decimal = numbers.WIDEST
    step: Decimal = Decimal(1)

    @cached_property
    def expression(self) -> Expression:
        return numbers.number(self.minimum, self.maximum, self.step)

    def _value(self, text: str) -> Decimal:
        return Decimal(text)


class Date(_Answer):
    """A date of the calendar."""

    type: Literal["date"] = "date"
    format: str = Field("%Y-%m-%d", max_length=64, description="%Y, %m and %d, each once, and text")

    @property
    def name(self) -> str:
        """The type's name, with the format."""
        return f"date {self.format}"

    @cached_property
    def expression(self) -> Expression:
        return numbers.date(self.format)

    def _value(self, text: str) -> date:
        return datetime.strptime(text, self.format).date()


class Regex(_Answer):
    """A text that a regular expression matches completely."""

    type: Literal["regex"] = "regex"
    pattern: str

    @cached_property
    def expression(self) -> Expression:
        return regex.parse(self.pattern)


class Json(_Answer):
    """JSON that follows a schema."""

    type: Literal["json"] = "json"
    # Use an alias: pydantic's models have a method `schema`.
    json_schema: str = Field(alias="schema", description="the schema, as JSON")
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _schema_as_text(cls, data: Any) -> Any:
        """A suite's file may hold the schema as JSON instead of text."""
        if isinstance(data, dict) and isinstance(data.get("schema"), dict):
            return {**data, "schema": json.dumps(data["schema"], ensure_ascii=False)}
        return data

    @cached_property
    def expression(self) -> Expression:
        return schema.parse(self.json_schema)

    def _value(self, text: str) -> Value:
        found: Value = json.loads(text)
        return found


class Grammar(_Answer):
    """A text that matches an EBNF grammar without recursion."""

    type: Literal["grammar"] = "grammar"
    rules: str

    @cached_property
    def expression(self) -> Expression:
        return grammar.parse(self.rules)


class Text(_Answer):
    """Any text of one line."""

    type: Literal["text"] = "text"
    max_length: int = Field(0, ge=0, le=language.MAX_REPEATS, description="characters; 0: no limit")

    @cached_property
    def expression(self) -> Expression:
        visible = language.anything_but([(0, 32), (127, 160)])
        inner = language.anything_but([(0, 31), (127, 159)])
        rest = language.Repeat(inner, 0, self.max_length - 1 if self.max_length else None)
        return language.sequence(visible, rest)


AnswerType = Annotated[Label | Number | Date | Regex | Json | Grammar | Text, Field(discriminator="type")]
