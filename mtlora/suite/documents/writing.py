"""Writes facts as a document of one of six kinds."""

import datetime
import random
from collections.abc import Sequence
from decimal import Decimal
from typing import Final

from mtlora.suite.builtin.words import MONTHS
from mtlora.suite.documents.facts import MATERIAL, Facts

# Approximate size limits of a document, in characters; a digit counts as four. 4.1 of them make a token of the default
# backbone.
SHORTEST: Final = 900
LONGEST: Final = 6_000
# Extra size of a sentence by kind of document: a log line's time and level, or a dash, or nothing.
_BESIDE = {"log": 60, "notes": 8}
_SIGNS = {"USD": "$", "EUR": "€", "GBP": "£"}
_LEVELS = ("INFO", "INFO", "INFO", "NOTE", "WARN", "DEBUG")


def write(facts: Facts, rng: random.Random) -> str:
    """The document's text, of a length between `SHORTEST` and `LONGEST`, about; short ones are more frequent."""
    wanted = SHORTEST * (LONGEST / SHORTEST) ** rng.random()
    sentences = [*_statements(facts, rng), *_distractions(facts, rng)]
    head, table = _header(facts, rng), _items(facts, rng)
    fillers = MATERIAL["fillers"]
    beside = _BESIDE.get(facts.kind, 1)
    size = _size(head) + _size(table) + sum(_size(sentence) + beside for sentence in sentences)
    # Use every filler once before using one again.
    pool: list[str] = []
    while size < wanted:
        pool = pool or rng.sample(fillers, len(fillers))
        sentences.append(pool.pop())
        size += _size(sentences[-1]) + beside
    rng.shuffle(sentences)
    body = _body(facts, sentences, rng)
    parts = [head, body]
    parts.insert(rng.randint(1, 2), table)
    return "\n\n".join(parts)


def _size(text: str) -> int:
    return len(text) + 3 * sum(map(str.isdigit, text))


def date_text(date: datetime.date, rng: random.Random) -> str:
    """A date in one of five notations; none is ambiguous."""
    month = MONTHS[date.month - 1]
    return rng.choice((
        date.isoformat(),
        f"{date.day} {month} {date.year}",
        f"{month} {date.day}, {date.year}",
        f"{date.day} {month[:3]} {date.year}",
        f"{date.day:02}.{date.month:02}.{date.year}",
    ))  # fmt: skip


def amount_text(amount: Decimal, currency: str, rng: random.Random) -> str:
    """An amount of money, with or without commas between thousands."""
    number = rng.choice((f"{amount:.2f}", f"{amount:,.2f}"))
    return rng.choice((f"{number} {currency}", f"{currency} {number}", f"{_SIGNS[currency]}{number}"))


def _header(facts: Facts, rng: random.Random) -> str:
    values = {
        "sender": facts.sender,
        "recipient": facts.recipient,
        "date": date_text(facts.date, rng),
        "reference": facts.reference,
        "people": ", ".join(facts.people),
    }
    lines = [f"{_label(name, facts, rng)}: {value}" for name, value in values.items()]
    rng.shuffle(lines)
    return "\n".join([rng.choice(MATERIAL["titles"][facts.kind]), *lines])


def _label(name: str, facts: Facts, rng: random.Random) -> str:
    return str(rng.choice(MATERIAL["headers"][name][facts.kind]))


def _items(facts: Facts, rng: random.Random) -> str:
    form = rng.choice(("- {q} x {n} at {p}", "* {n}: {q} at {p} each", "{n} | {q} | {p}"))
    lines = [form.format(n=item.name, q=item.quantity, p=f"{item.price:.2f}") for item in facts.items]
    return "\n".join([f"{_label('items', facts, rng)}:", *lines])


def _statements(facts: Facts, rng: random.Random) -> list[str]:
    """A sentence for each fact that the document has."""
    values = {
        "company": facts.company,
        "city": facts.city,
        "email": facts.email,
        "phone": facts.phone,
        "budget_code": facts.cost_centre,
        "product": facts.product,
        "due": None if facts.due is None else date_text(facts.due, rng),
        "total": None if facts.total is None else amount_text(facts.total, facts.currency, rng),
    }
    found = [rng.choice(MATERIAL["facts"][name]).format(v=v) for name, v in values.items() if v is not None]
    for name in ("priority", "decision", "attachment", "reply", "satisfaction"):
        found.append(rng.choice(MATERIAL[name][getattr(facts, name)]))
    return found + rng.sample(MATERIAL["topics"][facts.topic]["sentences"], rng.randint(1, 2))


def _distractions(facts: Facts, rng: random.Random) -> list[str]:
    values = {
        "date": lambda: date_text(rng.choice(facts.other_dates), rng),
        "amount": lambda: amount_text(Decimal(rng.randint(1_000, 899_999)) / 100, facts.currency, rng),
        "person": lambda: rng.choice(facts.other_people),
        "reference": lambda: f"Z{rng.choice('ABCDEFGHKLMNPRSTX')}-{rng.randint(1000, 9999)}",
    }
    return [
        rng.choice(MATERIAL["distractors"][name]).format(**{name: draw()})
        for name, draw in values.items()
        if rng.random() < 0.7
    ]


def _body(facts: Facts, sentences: Sequence[str], rng: random.Random) -> str:
    match facts.kind:
        case "log":
            second = rng.randrange(6 * 3600, 12 * 3600)
            lines = []
            for sentence in sentences:
                second += rng.randint(1, 300)
                clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
                lines.append(f"{clock} {rng.choice(_LEVELS)} {sentence}")
            return "\n".join(lines)
        case "notes":
            return "\n".join(f"- {sentence}" for sentence in sentences)
        case "contract":
            return "\n".join(f"{n}. {' '.join(part)}" for n, part in enumerate(_paragraphs(sentences, rng), 1))
        case _:
            return "\n\n".join(" ".join(part) for part in _paragraphs(sentences, rng))


def _paragraphs(sentences: Sequence[str], rng: random.Random) -> list[Sequence[str]]:
    found, start = [], 0
    while start < len(sentences):
        end = start + rng.randint(2, 6)
        found.append(sentences[start:end])
        start = end
    return found
