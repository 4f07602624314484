"""Answer types of tasks, and the regular languages that implement them."""

from mtlora.answer.language import AnswerError
from mtlora.answer.types import AnswerType, Date, Grammar, Json, Label, Number, Regex, Text, Value

__all__ = ["AnswerError", "AnswerType", "Date", "Grammar", "Json", "Label", "Number", "Regex", "Text", "Value"]
