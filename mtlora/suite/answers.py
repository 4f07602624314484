"""Answer types of the tasks in the built-in suite and in BIG-Bench Hard."""

import re
from collections.abc import Iterable, Mapping

from mtlora.answer import AnswerType, Date, Label, Number, Regex

_BRACKETS = Regex(pattern=r"[\])}>]( [\])}>]){0,15}")
_WORDS = Regex(pattern=r"[a-z]{1,24}( [a-z]{1,24}){0,31}")
# Words as in BIG-Bench Hard: they've, at&t, r's.
_ALL_WORDS = Regex(pattern=r"[a-z][a-z'&.-]{0,23}( [a-z][a-z'&.-]{0,23}){0,31}")
_HOUR = "(1[0-2]|[1-9])(am|pm)"

# Tasks whose suite sets `allowed_answers` need no entry.
BUILTIN: Mapping[str, AnswerType] = {
    "logical_deduction": Regex(pattern=r"[A-Za-z]{2,16}"),
    "bracket_completion": _BRACKETS,
    "multistep_arithmetic": Number(minimum=-999, maximum=999),
    "list_operations": Number(minimum=10, maximum=99),
    "sequence_continuation": Regex(pattern=r"[a-z]{2,12}|0|[1-9]\d{0,2}"),
    "word_sorting": _ALL_WORDS,
    "string_operations": _WORDS,
    "hyperbaton": Regex(pattern=r"[A-Za-z-]{2,16}( [A-Za-z-]{2,16}){1,7}"),
    "tracking_shuffled_objects": Regex(pattern=r"[a-z]{2,12}"),
    "table_lookup": Regex(pattern=r"[A-Z][a-z]{1,12}|0|[1-9]\d{0,2}"),
    "date_arithmetic": Date(format="%m/%d/%Y"),
    "temporal_sequences": Regex(pattern=f"{_HOUR} to {_HOUR}"),
    "date_normalisation": Date(),
    "amount_normalisation": Regex(pattern=r"(0|[1-9]\d{0,8})\.\d\d (USD|EUR|GBP)"),
    "field_extraction": Regex(pattern=r"[a-z]{2,12}\.[a-z]{2,12}@[a-z]{2,12}\.(com|net|org)|555-\d{4}|[A-K]-\d{4}"),
    "unit_conversion": Regex(pattern=r"(0|[1-9]\d{0,8})(\.\d{1,6})? (km|m|cm|mm|kg|g|t|l|ml|h|min|s|days|weeks)"),
    "log_triage": Regex(pattern=r"(error|warning|info|critical) [A-Z]\d{3}"),
}

_YES_OR_NO = Label(labels=("Yes", "No"))


def _options(last: str) -> Label:
    """`(A)` to the last letter."""
    return Label(labels=tuple(f"({chr(code)})" for code in range(ord("A"), ord(last) + 1)))


BBH: Mapping[str, AnswerType] = {
    "boolean_expressions": Label(labels=("True", "False")),
    "causal_judgement": _YES_OR_NO,
    "date_understanding": _options("F"),
    "disambiguation_qa": _options("C"),
    "dyck_languages": _BRACKETS,
    "formal_fallacies": Label(labels=("valid", "invalid")),
    "geometric_shapes": _options("K"),
    "hyperbaton": _options("B"),
    "logical_deduction_five_objects": _options("E"),
    "logical_deduction_seven_objects": _options("G"),
    "logical_deduction_three_objects": _options("C"),
    "movie_recommendation": _options("E"),
    "multistep_arithmetic_two": Number(minimum=-999_999, maximum=999_999),
    "navigate": _YES_OR_NO,
    "object_counting": Number(minimum=0, maximum=99),
    "penguins_in_a_table": _options("E"),
    "reasoning_about_colored_objects": _options("R"),
    # Two published targets contain the option's text.
    "ruin_names": Regex(pattern=r"\([A-D]\)|[a-z][a-z,& ]{0,38}[a-z]"),
    "salient_translation_error_detection": _options("F"),
    "snarks": _options("B"),
    "sports_understanding": Label(labels=("yes", "no")),
    "temporal_sequences": _options("D"),
    "tracking_shuffled_objects_five_objects": _options("E"),
    "tracking_shuffled_objects_seven_objects": _options("G"),
    "tracking_shuffled_objects_three_objects": _options("C"),
    "web_of_lies": _YES_OR_NO,
    "word_sorting": _ALL_WORDS,
}


def joined(types: Iterable[AnswerType | None]) -> AnswerType | None:
    """A type that allows all answers of all these types; None if there is no such type, or if one of them is None."""
    first, *others = types
    for other in others:
        first = _joined(first, other)
    return first


def _joined(one: AnswerType | None, other: AnswerType | None) -> AnswerType | None:
    match one, other:
        case _ if one == other:
            return one
        case Label(), Label():
            return Label(labels=tuple(dict.fromkeys((*one.labels, *other.labels))))
        case Label(), Number() if all(map(other.check, one.labels)):
            return other
        case Number(), Label():
            return _joined(other, one)
        case ((Label() | Regex()), (Label() | Regex())):
            return Regex(pattern="|".join((_pattern(one), _pattern(other))))
    return None


def _pattern(answer: Label | Regex) -> str:
    return answer.pattern if isinstance(answer, Regex) else "|".join(map(re.escape, answer.labels))
