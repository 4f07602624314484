"""Regular expressions in Python's syntax that match the whole answer."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

from mtlora.answer import language
from mtlora.answer.language import LAST, MAX_REPEATS, AnswerError, Chars, Expression, Repeat

# Python's own parser accepts exactly the syntax of `re`.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import sre_constants
    import sre_parse

MAX_CHARACTERS = 10_000
_DEEPEST = 50
_DIGITS = ((48, 57),)
_WORD = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE = ((9, 13), (32, 32))
_CATEGORIES = {
    sre_constants.CATEGORY_DIGIT: language.chars(_DIGITS),
    sre_constants.CATEGORY_NOT_DIGIT: language.anything_but(_DIGITS),
    sre_constants.CATEGORY_WORD: language.chars(_WORD),
    sre_constants.CATEGORY_NOT_WORD: language.anything_but(_WORD),
    sre_constants.CATEGORY_SPACE: language.chars(_SPACE),
    sre_constants.CATEGORY_NOT_SPACE: language.anything_but(_SPACE),
}
_BEGINNINGS = (sre_constants.AT_BEGINNING, sre_constants.AT_BEGINNING_STRING)
_ENDS = (sre_constants.AT_END, sre_constants.AT_END_STRING)
_NEWLINE = ((10, 10),)


def parse(text: str) -> Expression:
    """The expression of a pattern; \\d, \\w and \\s are ASCII. Raises AnswerError.

    Refuses look-around, back-references, flags, word boundaries, and anchors that are not at the outer ends.
    """
    if len(text) > MAX_CHARACTERS:
        raise AnswerError(f"regex: found {len(text)} characters; allowed: {MAX_CHARACTERS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = sre_parse.parse(text)
    except (re.error, OverflowError) as error:
        raise AnswerError(f"regex: {error}") from None
    except RecursionError:
        raise AnswerError(f"regex: nested deeper than {_DEEPEST}") from None
    if parsed.state.flags & ~sre_constants.SRE_FLAG_UNICODE:
        raise AnswerError("regex: takes no flags")
    items = list(parsed.data)
    if items and items[0][0] is sre_constants.AT and items[0][1] in _BEGINNINGS:
        del items[0]
    if items and items[-1][0] is sre_constants.AT and items[-1][1] in _ENDS:
        del items[-1]
    return language.sequence(*(_expression(item, 0) for item in items))


def _expression(item: tuple[Any, Any], depth: int) -> Expression:
    if depth > _DEEPEST:
        raise AnswerError(f"regex: nested deeper than {_DEEPEST}")
    operator, argument = item
    match operator:
        case sre_constants.LITERAL:
            return language.chars([(argument, argument)])
        case sre_constants.NOT_LITERAL:
            return language.anything_but([(argument, argument)])
        case sre_constants.ANY:
            return language.anything_but(_NEWLINE)
        case sre_constants.IN:
            return _class(argument)
        case sre_constants.BRANCH:
            return language.either(_all(option, depth) for option in argument[1])
        case sre_constants.SUBPATTERN if not argument[1] and not argument[2]:
            return _all(argument[3], depth)
        case sre_constants.MAX_REPEAT | sre_constants.MIN_REPEAT:
            least, most, inner = argument
            bound = None if most == sre_constants.MAXREPEAT else int(most)
            if max(least, bound or 0) > MAX_REPEATS:
                raise AnswerError(f"regex: found {max(least, bound or 0)} repeats; allowed: {MAX_REPEATS}")
            return Repeat(_all(inner, depth), int(least), bound)
    raise AnswerError(f"regex: takes no {str(operator).lower().replace('_', ' ')}")


def _all(items: Any, depth: int) -> Expression:
    return language.sequence(*(_expression(item, depth + 1) for item in items))


def _class(items: list[tuple[Any, Any]]) -> Chars:
    def ranges() -> Iterator[tuple[int, int]]:
        for operator, argument in items:
            match operator:
                case sre_constants.LITERAL:
                    yield argument, argument
                case sre_constants.RANGE:
                    yield argument[0], min(argument[1], LAST)
                case sre_constants.CATEGORY:
                    yield from _CATEGORIES[argument].ranges

    negated = bool(items) and items[0][0] is sre_constants.NEGATE
    return language.anything_but(ranges()) if negated else language.chars(ranges())
