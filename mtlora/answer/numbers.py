"""Numbers in a range, and dates of the calendar, as expressions."""

from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise

from mtlora.answer import language
from mtlora.answer.language import DIGIT, NOTHING, AnswerError, Expression, Repeat

# Largest absolute value, and most decimals.
LARGEST = Decimal(10) ** 15
MAX_DECIMALS = 9
# The range of a number that sets none.
WIDEST = Decimal(10) ** 12
# Most values if the step is not a power of ten: such values are listed one by one.
MAX_LISTED = 10_000


@lru_cache(maxsize=1024)
def number(minimum: Decimal, maximum: Decimal, step: Decimal) -> Expression:
    """Every multiple of `step` from `minimum` to `maximum`, without leading zeros.

    A value has at most as many decimals as the step. Raises AnswerError.
    """
    if not all(value.is_finite() for value in (minimum, maximum, step)):
        raise AnswerError("number: minimum, maximum and step must be finite")
    if max(abs(minimum), abs(maximum)) > LARGEST:
        raise AnswerError(f"number: minimum and maximum must lie within {-LARGEST:f} to {LARGEST:f}")
    if step <= 0 or minimum > maximum:
        raise AnswerError(f"number: found minimum {minimum}, maximum {maximum}, step {step}; the step is above 0")
    exponent = step.normalize().as_tuple().exponent
    decimals = max(0, -int(exponent))
    if decimals > MAX_DECIMALS:
        raise AnswerError(f"number: found a step of {decimals} decimals; allowed: {MAX_DECIMALS}")
    if step != Decimal(1).scaleb(-decimals):
        first, last = _ceiling(minimum / step), _floor(maximum / step)
        if last - first >= MAX_LISTED:
            raise AnswerError(
                f"number: {last - first + 1} multiples of {step}; allowed: {MAX_LISTED}, unless it is 1, 0.1, 0.01 ..."
            )
        if last < first:
            raise AnswerError(f"number: no multiple of {step} lies within {minimum} to {maximum}")
        return language.choice([f"{(step * n).normalize() + 0:f}" for n in range(first, last + 1)])
    if (minimum, maximum) == (-WIDEST, WIDEST):
        return _unlimited(decimals)
    options = [
        option
        for places in range(decimals + 1)
        for option in _signed(_ceiling(minimum.scaleb(places)), _floor(maximum.scaleb(places)), places)
    ]
    if not options:
        raise AnswerError(f"number: no multiple of {step} lies within {minimum} to {maximum}")
    return language.either(options)


def _unlimited(decimals: int) -> Expression:
    """A number without a range: up to twelve digits before the point."""
    fraction = language.sequence(language.literal("."), Repeat(DIGIT, 1, decimals)) if decimals else NOTHING
    whole = language.sequence(language.chars([(49, 57)]), Repeat(DIGIT, 0, 11), language.optional(fraction))
    zero = [language.sequence(language.literal("0"), fraction)] if decimals else []
    signed = language.sequence(language.optional(language.literal("-")), language.either([whole, *zero]))
    return language.either([signed, language.literal("0")])


def _floor(value: Decimal) -> int:
    return int(value.to_integral_value("ROUND_FLOOR"))


def _ceiling(value: Decimal) -> int:
    return int(value.to_integral_value("ROUND_CEILING"))


def _signed(low: int, high: int, places: int) -> Iterator[Expression]:
    """The integers `low` to `high`, with a decimal point before the last `places` digits."""
    if high >= 0:
        yield from _unsigned(max(0, low), high, places)
    if low < 0 and (options := list(_unsigned(max(1, -high), -low, places))):
        yield language.sequence(language.literal("-"), language.either(options))


def _unsigned(low: int, high: int, places: int) -> Iterator[Expression]:
    # Group numbers by their length: at least one digit stands before the point.
    for digits in range(places + 1, len(str(high)) + places + 2):
        first = 0 if digits == places + 1 else 10 ** (digits - 1)
        begin, end = max(low, first), min(high, 10**digits - 1)
        if begin <= end:
            yield _between(f"{begin:0{digits}}", f"{end:0{digits}}", digits - places)


def _between(low: str, high: str, point: int) -> Expression:
    """Digit texts from `low` to `high`, equally long; a point follows the first `point` digits, if more follow."""
    if not low:
        return NOTHING
    dot = language.literal(".") if point == 0 else NOTHING
    rest, full, empty = point - 1, "9" * (len(low) - 1), "0" * (len(low) - 1)
    if low == "0" * len(low) and high == "9" * len(high):
        if 0 < point < len(low):
            return language.sequence(
                Repeat(DIGIT, point, point), language.literal("."), Repeat(DIGIT, len(low) - point, len(low) - point)
            )
        return language.sequence(dot, Repeat(DIGIT, len(low), len(low)))
    if low[0] == high[0]:
        return language.sequence(dot, language.literal(low[0]), _between(low[1:], high[1:], rest))
    options = []
    begin, end = int(low[0]), int(high[0])
    if low[1:] != empty:
        options.append(language.sequence(language.literal(low[0]), _between(low[1:], full, rest)))
        begin += 1
    if high[1:] != full:
        options.append(language.sequence(language.literal(high[0]), _between(empty, high[1:], rest)))
        end -= 1
    if begin <= end:
        digits = language.chars([(ord(str(begin)), ord(str(end)))])
        options.append(language.sequence(digits, _between(empty, full, rest)))
    return language.sequence(dot, language.either(options))


_MONTHS = {31: (1, 3, 5, 7, 8, 10, 12), 30: (4, 6, 9, 11)}
_QUARTERS = [f"{n:02}" for n in range(4, 100, 4)]


def date(format: str) -> Expression:
    """Every date of the years 0001 to 9999 in a format of %Y, %m, %d (each once) and text. Raises AnswerError."""
    parts = _directives(format)
    year = _between("0001", "9999", 9)
    leap = language.either(
        [
            language.sequence(DIGIT, DIGIT, language.choice(_QUARTERS)),
            language.sequence(language.choice(_QUARTERS), language.literal("00")),
        ]
    )

    def dates(years: Expression, months: tuple[int, ...], first: int, last: int) -> Expression:
        named = {
            "%Y": years,
            "%m": language.choice([f"{month:02}" for month in months]),
            "%d": _between(f"{first:02}", f"{last:02}", 9),
        }
        return language.sequence(*(named[part] if part in named else language.literal(part) for part in parts))

    return language.either(
        [
            *(dates(year, months, 1, days) for days, months in _MONTHS.items()),
            dates(year, (2,), 1, 28),
            dates(leap, (2,), 29, 29),
        ]
    )


def _directives(format: str) -> list[str]:
    parts, at = [], 0
    while at < len(format):
        size = 2 if format[at] == "%" else 1
        parts.append("%" if format[at : at + 2] == "%%" else format[at : at + size])
        at += size
    wrong = [part for part in parts if len(part) == 2 and part not in ("%Y", "%m", "%d")]
    if wrong or sorted(part for part in parts if len(part) == 2) != ["%Y", "%d", "%m"] or format.endswith("%"):
        raise AnswerError(f"date: found the format {format[:64]!r}; allowed: %Y, %m and %d, each once, and text")
    if any(a == "%Y" and b[0].isdigit() for a, b in pairwise(parts)):
        raise AnswerError(f"date: found the format {format[:64]!r}; allowed: no digit right after %Y")
    return parts
