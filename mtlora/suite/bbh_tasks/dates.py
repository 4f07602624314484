"""Dates: what day today is, told indirectly, and what date another day has."""

import datetime
import random
import re
from collections.abc import Callable

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, look_up, matched, read_options, with_options
from mtlora.suite.derivations import US_DATE, months_later

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_DAY = datetime.timedelta(days=1)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


_ASKED: dict[str, Callable[[datetime.date], datetime.date]] = {
    "today": lambda today: today,
    "tomorrow": lambda today: today + _DAY,
    "24 hours later": lambda today: today + _DAY,
    "yesterday": lambda today: today - _DAY,
    "10 days ago": lambda today: today - 10 * _DAY,
    "one week from today": lambda today: today + 7 * _DAY,
    "one week ago from today": lambda today: today - 7 * _DAY,
    "a month ago": lambda today: months_later(today, -1),
    "one year ago from today": lambda today: months_later(today, -12),
}


def _read(text: str) -> datetime.date:
    """A date such as `4/19/1969` or `Apr 19, 1969`."""
    if slashes := re.search(r"(\d{1,2})/(\d{1,2})/(\d{4})", text):
        return datetime.date(int(slashes[3]), int(slashes[1]), int(slashes[2]))
    words = matched(r"(\w{3})\w*\.? (\d{1,2})(?:st|nd|rd|th)?, (\d{4})", text)
    return datetime.date(int(words[3]), _MONTHS.index(words[1]) + 1, int(words[2]))


def _monday(year: int, weekday: int, month: int, nth: int) -> datetime.date:
    """The nth of a weekday (Monday is 0) in a month."""
    first = datetime.date(year, month, 1)
    return first + ((weekday - first.weekday()) % 7 + 7 * (nth - 1)) * _DAY


def _second_time(groups: tuple[str, ...]) -> datetime.date:
    return datetime.date(int(groups[2]), int(groups[0]), int(groups[1]))


# (pattern, today's date from its groups). The first match counts.
_TELLINGS: tuple[tuple[str, Callable[[tuple[str, ...]], datetime.date]], ...] = (
    # Three texts of the benchmark whose targets assume another day than the text says.
    (r"^2015 is coming in 36 hours", lambda g: datetime.date(2014, 12, 29)),
    (r"married on Jan 2, 1958\. It is their 5-year anniversary", lambda g: datetime.date(1961, 1, 2)),
    (r"Today is the US Thanksgiving of 2001", lambda g: datetime.date(2002, 11, 22)),
    (r"^Yesterday,? (?:was )?([\w/]+(?: \d+, \d+)?)", lambda g: _read(g[0]) + _DAY),
    (r"^The day before yesterday was ([\d/]+)", lambda g: _read(g[0]) + 2 * _DAY),
    (r"^Tomorrow is ([\d/]+)", lambda g: _read(g[0]) - _DAY),
    (r"for tomorrow[, ]+\(?(?:\w+, )?(\d+/\d+/\d+|\w+ \d+, \d+)", lambda g: _read(g[0]) - _DAY),
    (r"rescheduled to 11 am tomorrow, ([\d/]+)", lambda g: _read(g[0]) - _DAY),
    (r"^(\w+ \d+, \d+) is like yesterday to Jane, but that is actually ten years ago",
     lambda g: months_later(_read(g[0]), 120)),
    (r"born on the last day of Feburary in (\d+)\. Today is her 16-year-old birthday",
     lambda g: months_later(datetime.date(int(g[0]), 3, 1) - _DAY, 192)),
    (r"^Today is (\d+)/(\d+), and it is Jane's second time in the year (\d{4})", _second_time),
    (r"^Today is (\d+)/(\d+)\. Jane is watching NFL (\d{4})", _second_time),
    (r"^(\d{4}) is coming in 36 hours", lambda g: datetime.date(int(g[0]), 1, 1) - 2 * _DAY),
    (r"Jane thinks today is ([\d/]+), but John thinks today is [\d/]+\. Jane is correct", lambda g: _read(g[0])),
    (r"Jane thinks today is [\d/]+, but John thinks today is ([\d/]+)\. John is correct", lambda g: _read(g[0])),
    (r"Jane thought today is ([\d/]+), but today is in fact \w+ \d+, which is 1 day later",
     lambda g: _read(g[0]) + _DAY),
    (r"Today is the US Thanksgiving of (\d{4})", lambda g: _monday(int(g[0]), 3, 11, 4)),
    (r"^Today is the (\w+) day of the (\w+) month of (\d{4})",
     lambda g: datetime.date(int(g[2]), _ORDINALS.index(g[1]) + 1, _ORDINALS.index(g[0]) + 1)),
    (r"^The deadline is (\w+ \d+, \d+), which is 2 days away from now", lambda g: _read(g[0]) - 2 * _DAY),
    (r"got her job in (\d{4})\. Today is her 3-year work anniversary\..* on (\w+ \d+), her second day",
     lambda g: months_later(_read(f"{g[1]}, {g[0]}") - _DAY, 36)),
    (r"^It was (\w+\.? \d+\w\w, \d{4}) a week ago", lambda g: _read(g[0]) + 7 * _DAY),
    (r"quited her job on (\w+ \d+, \d+)\. (\d+) days have passed", lambda g: _read(g[0]) + int(g[1]) * _DAY),
    (r"^Today is Christmas Eve of (\d{4})", lambda g: datetime.date(int(g[0]), 12, 24)),
    (r"married on (\w+ \d+, \d+)\. Today is their golden wedding", lambda g: months_later(_read(g[0]), 600)),
    (r"married on (\w+ \d+, \d+)\. It is their 5-year anniversary", lambda g: months_later(_read(g[0]), 60)),
    (r"last day of the first quarter of (\d{4})", lambda g: datetime.date(int(g[0]), 3, 31)),
    (r"In the UK.* today is (\d+)/(\d+)/(\d{4}) to them",
     lambda g: datetime.date(int(g[2]), int(g[1]), int(g[0]))),
    (r"^On (\w+ \d+\w\w, \d{4}) Jane bought (\d+) eggs\. She ate one per day",
     lambda g: _read(g[0]) + int(g[1]) * _DAY),
    (r"scheduled to be on ([\d/]+), but was delayed by one day to today", lambda g: _read(g[0]) + _DAY),
    (r"on the (\d+)th of each month starting from the (\w{3})\w* of (\d{4})\. It is her (\d+)th visit",
     lambda g: months_later(datetime.date(int(g[2]), _MONTHS.index(g[1]) + 1, int(g[0])), int(g[3]) - 1)),
    (r"celebrating the last day of (\w{3})\w* (\d{4})",
     lambda g: months_later(datetime.date(int(g[1]), _MONTHS.index(g[0]) + 1, 1), 1) - _DAY),
    (r"today is the first Monday of (\d{4})", lambda g: _monday(int(g[0]), 0, 1, 1)),
    (r"^Today is the palindrome day of 2020", lambda g: datetime.date(2020, 2, 2)),
    (r"^This is the last day of (\d{4})", lambda g: datetime.date(int(g[0]), 12, 31)),
    (r"^Today is the first day of (\d{4})", lambda g: datetime.date(int(g[0]), 1, 1)),
    (r"^The current local time is [\d:]+ [ap]m of ([\d/]+)", lambda g: _read(g[0])),
    (r"^(?:Today is|Today,|It is) (\d+/\d+/\d{4}|\w+ \d+, \d{4})", lambda g: _read(g[0])),
)  # fmt: skip


def solve_dates(text: str) -> Solution:
    """Works it out as today's date, the date asked for, and the options up to that one."""
    letters = read_options(text)
    body = matched(r"^(.*) What is the date (.*) in MM/DD/YYYY\?\n", text)
    if body[2] not in _ASKED:
        raise UnsolvedError(f"no known day: {body[2]!r}")
    today = _today(body[1])
    asked = _ASKED[body[2]](today).strftime(US_DATE)
    read, answer = look_up(letters, asked)
    return Solution(f"{today.strftime(US_DATE)}, {asked}: {read}", answer)


def _today(text: str) -> datetime.date:
    """Today's date in a text. Raises UnsolvedError if the text does not tell."""
    for pattern, today_from in _TELLINGS:
        if found := re.search(pattern, text):
            try:
                return today_from(found.groups())
            except ValueError as error:
                raise UnsolvedError(f"no date: {error}") from None
    raise UnsolvedError("nothing tells what today is")


# Texts of the benchmark. Their dates may be replaced, except in texts about one particular year or day.
_TEXTS = (
    "Yesterday, Jan 21, 2011, Jane ate 2 pizzas and 5 wings.",
    "Jane was born on the last day of Feburary in 2001. Today is her 16-year-old birthday.",
    "Today is Apr 10, 1985. Jane's appointment will be 3 days later.",
    "Today is 3/5, and it is Jane's second time in the year 1973 to see a meteor shower.",
    "Jane scheduled 3 apointments with 5 poeple for tomorrow (Tue, 7/9/1972).",
    "May 6, 1992 is like yesterday to Jane, but that is actually ten years ago.",
    "2015 is coming in 36 hours.",
    "Jane thinks today is 6/18/2019, but John thinks today is 6/19/2019. John is correct.",
    "Jane booked a flight for tomorrow, Jul 29, 2002.",
    "Today is 9/7. Jane is watching NFL 2003.",
    "Yesterday was April 30, 2021.",
    "Today is Sep 9, 1909.",
    "In the US, Thanksgiving is on the fourth Thursday of November. Today is the US Thanksgiving of 2001.",
    "Today is the second day of the third month of 1966.",
    "The deadline is Jun 1, 2021, which is 2 days away from now.",
    "Jane got her job in 2016. Today is her 3-year work anniversary. She still remember that on Dec 2, her second day "
    "at work, she spilled coffee on her laptop.",
    "It was Sept. 1st, 2021 a week ago.",
    "Jane quited her job on Mar 20, 2020. 176 days have passed since then.",
    "Today is Christmas Eve of 1937.",
    "Jane and John married on Jan 2, 1958. Today is their golden wedding anniversary.",
    "Jane thought today is 3/11/2002, but today is in fact Mar 12, which is 1 day later.",
    "Jane and John married on Jan 2, 1958. It is their 5-year anniversary today.",
    "Today is the last day of the first quarter of 2008.",
    "In the UK, people usually put the day before the month when formatting the date. Therefore, today is 02/01/1987 "
    "to them.",
    "Today, 8/3/1997, is a day that we will never forget.",
    "It is 4/19/1969 today.",
    "The day before yesterday was 11/23/1933.",
    "Jane thinks today is 6/18/2019, but John thinks today is 6/19/2019. Jane is correct.",
    "On May 9th, 2017 Jane bought 40 eggs. She ate one per day. Today she ran out of eggs.",
    "The concert was scheduled to be on 06/01/1943, but was delayed by one day to today.",
    "Jane visits the bookstore on the 16th of each month starting from the October of 2009. It is her 5th visit to the "
    "bookstore today.",
    "Yesterday was 12/31/1929. Today could not be 12/32/1929 because December has only 31 days.",
    "Tomorrow is 11/12/2019.",
    "Jane is celebrating the last day of Jan 2012.",
    "The first day of 2019 is a Tuesday, and today is the first Monday of 2019.",
    "Today is the palindrome day of 2020, because the MMDDYYYY format of the date is the same backwards as forwards.",
    "Jane was born on the last day of Feburary in 2000. Today is her 16-year-old birthday.",
    "The current local time is 3:02 pm of 5/4/2004.",
    "This is the last day of 1899.",
    "Today's meeting is rescheduled to 11 am tomorrow, 10/16/1924.",
    "Today is the first day of 2007.",
)
# Probability that a text gets another date.
_REDATED = 0.3


def _redated(rng: random.Random, text: str) -> str:
    """The text with another full date, if it holds exactly one."""
    date = datetime.date(1900, 1, 1) + rng.randrange(130 * 365) * _DAY
    slashes, words = re.findall(r"\d+/\d+/\d{4}", text), re.findall(r"\b[A-Z]\w\w \d+, \d{4}", text)
    if len(slashes) + len(words) != 1 or any(word in text for word in ("because", "in fact", "UK")):
        return text
    if words:
        return text.replace(words[0], f"{_MONTHS[date.month - 1]} {date.day}, {date.year}")
    return text.replace(slashes[0], f"{date.month}/{date.day}/{date.year}")


def generate_dates(rng: random.Random) -> str:
    """One of the benchmark's texts, sometimes with another date, and six options around the right one."""
    text = rng.choice(_TEXTS)
    if rng.random() < _REDATED:
        text = _redated(rng, text)
    phrase = rng.choice(tuple(_ASKED))
    question = f"{text} What is the date {phrase} in MM/DD/YYYY?"
    today = _today(text)
    right = _ASKED[phrase](today)
    near: set[datetime.date] = set()
    while len(near) < 5:
        days = rng.choice((1, -1, 2, 3, -3, 7, -7, 10, -10, 30, -30, rng.randint(-60, 60)))
        other = rng.choice((right, right, right, today)) + days * _DAY
        if rng.random() < 0.25:
            other = months_later(other, 12 * rng.choice((-30, -3, -1, 1, 5, 40)))
        if other not in (right, today):
            near.add(other)
    options = [date.strftime(US_DATE) for date in (right, *sorted(near))]
    rng.shuffle(options)
    return with_options(question, options)


TASKS = (
    BBHTask(
        "date_understanding", "Finds a date from a text that tells in a roundabout way what today is.",
        solve_dates, 144, generate_dates,
    ),
)  # fmt: skip
