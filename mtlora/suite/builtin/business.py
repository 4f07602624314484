"""Business tasks: normalise dates, amounts and units, extract fields, sort messages."""

import datetime
import json
import random
from decimal import Decimal
from pathlib import Path

from mtlora.suite.builtin.task import GeneratedTask, task
from mtlora.suite.builtin.words import MONTHS, NAMES

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def date_normalisation(rng: random.Random) -> tuple[str, str]:
    """A date in one of ten notations. The instruction says how to read the two ambiguous ones."""
    date = datetime.date(2000, 1, 1) + datetime.timedelta(days=rng.randrange(40 * 365))
    day, month, year = date.day, MONTHS[date.month - 1], date.year
    text = rng.choice((
        f"{month} {day}, {year}",
        f"{month[:3]} {day}, {year}",
        f"{day} {month} {year}",
        f"{day} {month[:3]} {year}",
        f"the {_ordinal(day)} of {month}, {year}",
        f"{month} {_ordinal(day)}, {year}",
        f"{_WEEKDAYS[date.weekday()]}, {day} {month} {year}",
        f"{date.month}/{day}/{year}",
        f"{day:02}.{date.month:02}.{year}",
        f"{day:02}-{month[:3]}-{year % 100:02}",
    ))  # fmt: skip
    return text, date.isoformat()


_CURRENCIES = (("USD", "$", "dollars"), ("EUR", "€", "euros"), ("GBP", "£", "pounds"))


def amount_normalisation(rng: random.Random) -> tuple[str, str]:
    """An amount of money in one of several notations, to two decimals and the currency's code."""
    code, sign, name = rng.choice(_CURRENCIES)
    kind = rng.choice(("plain", "cents", "thousands", "k", "m"))
    if kind == "plain":
        value = Decimal(rng.randint(2, 999))
        number = str(value)
    elif kind == "cents":
        value = Decimal(rng.randint(101, 99_999)) / 100
        number = f"{value:.2f}"
    elif kind == "thousands":
        value = Decimal(rng.randint(1_000, 99_999))
        number = f"{value:,}"
    else:
        # The number has at most one decimal: 3, 4.5, 12. Millions stay below ten, because their zeros must be counted.
        largest = 99 if kind == "k" else 9
        tenths = rng.choice((rng.randint(1, largest) * 10, rng.randint(11, largest * 10 + 9)))
        digits = f"{tenths // 10}.{tenths % 10}" if tenths % 10 else str(tenths // 10)
        value = Decimal(tenths) / 10 * (1_000 if kind == "k" else 1_000_000)
        number = digits + kind
        if rng.random() < 0.5:
            word = "thousand" if kind == "k" else "million"
            return f"{digits} {word} {name}", f"{value:.2f} {code}"
    notations = (f"{sign}{number}", f"{sign}{number}", f"{number} {code}", f"{code} {number}", f"{number} {name}")
    return rng.choice(notations), f"{value:.2f} {code}"


_SURNAMES = ("baker", "brown", "clark", "cook", "hill", "king", "lee", "moore", "price", "reed", "stone", "wood")
_DOMAINS = ("example.com", "mail.com", "post.net", "web.org")
_FIELDS = ("email", "phone", "order")
_MENTIONS: dict[str, tuple[str, ...]] = {
    "email": ("write to {v}", "my email is {v}", "you can reach me at {v}", "please answer to {v}"),
    "phone": ("call me on {v}", "my phone number is {v}", "you can ring {v}", "my number is {v}"),
    "order": ("it is about order {v}", "my order is {v}", "order {v} is late", "I ask about order {v}"),
}
_OPENINGS = ("Hello", "Hi", "Good morning", "Dear team", "Hi there", "Hello all")


def field_extraction(rng: random.Random) -> tuple[str, str]:
    """One of two fields that a short message mentions."""
    name = rng.choice(NAMES)
    values = {
        "email": f"{name.lower()}.{rng.choice(_SURNAMES)}@{rng.choice(_DOMAINS)}",
        "phone": f"555-{rng.randint(0, 9999):04}",
        "order": f"{rng.choice('ABCDEFGHJK')}-{rng.randint(1000, 9999)}",
    }
    mentioned = rng.sample(_FIELDS, 2)
    first, second = (rng.choice(_MENTIONS[field]).format(v=values[field]) for field in mentioned)
    joint = rng.choice((", and ", "; ", ". Also, "))
    asked = rng.choice(mentioned)
    return f"{asked}: {rng.choice(_OPENINGS)}, {name} here, {first}{joint}{second}.", values[asked]


# Intent -> ways to request it, and exclusions: ways to rule it out. `{p}` is a product.
INTENTS: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("intents.json").read_text())
_PRODUCTS = (
    "lamp", "kettle", "phone", "radio", "printer", "camera", "monitor", "keyboard", "tablet", "toaster", "blender",
    "heater", "speaker", "drill", "vacuum", "watch", "fan", "router", "mixer", "scanner",
)  # fmt: skip
_GREETINGS = ("", "Hi, ", "Hello, ", "Good day, ", "Hey, ", "Dear team, ")


def intent(rng: random.Random) -> tuple[str, str]:
    """A customer's message; half of the messages also rule out another intent."""
    wanted = rng.choice(tuple(INTENTS))
    request = rng.choice(INTENTS[wanted]["requests"]).format(p=rng.choice(_PRODUCTS))
    greeting = rng.choice(_GREETINGS)
    if rng.random() < 0.5:
        other = rng.choice([name for name in INTENTS if name != wanted])
        aside = rng.choice(INTENTS[other]["exclusions"])
        if rng.random() < 0.5:
            text = f"{aside}, but {request}"
        else:
            text = f"{request}{'' if request.endswith('?') else '.'} {aside[0].upper()}{aside[1:]}"
    else:
        text = request
    text = greeting + text if greeting else text[0].upper() + text[1:]
    return text if text.endswith("?") else f"{text}.", wanted


_ASPECTS = (
    "battery", "screen", "sound", "price", "service", "design", "delivery", "quality", "packaging", "size", "support",
    "finish",
)  # fmt: skip
PRAISE = (
    "is great", "is excellent", "is better than I hoped", "is not bad at all", "made me happy", "never lets me down",
    "is a pleasure", "could not be better", "is worth every cent", "impressed me",
)  # fmt: skip
BLAME = (
    "is awful", "is a letdown", "is worse than I feared", "is not good at all", "made me angry", "never satisfied me",
    "is a nuisance", "could not be worse", "is a waste of money", "annoyed me",
)  # fmt: skip


def review_sentiment(rng: random.Random) -> tuple[str, str]:
    """Two judgements: both good, both bad, or one of each."""
    wanted = rng.choice(("positive", "negative", "mixed"))
    good = {"positive": [True, True], "negative": [False, False], "mixed": [True, False]}[wanted]
    rng.shuffle(good)
    first, second = rng.sample(_ASPECTS, 2)
    judgements = [rng.choice(PRAISE if praised else BLAME) for praised in good]
    # The word between them must not reveal the answer, so it means neither contrast nor likeness.
    joint = rng.choice((". The", ", the", "; the", " and the"))
    return f"{rng.choice(_PRODUCTS).capitalize()}: the {first} {judgements[0]}{joint} {second} {judgements[1]}.", wanted


# (from, to, number of `to` units in one `from` unit)
UNITS: tuple[tuple[str, str, int], ...] = (
    ("km", "m", 1000), ("kg", "g", 1000), ("l", "ml", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("t", "kg", 1000),
)  # fmt: skip
TIMES: tuple[tuple[str, str, int], ...] = (("h", "min", 60), ("min", "s", 60), ("days", "h", 24), ("weeks", "days", 7))


def _plain(value: Decimal) -> str:
    """A number without exponent or trailing zeros."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def unit_conversion(rng: random.Random) -> tuple[str, str, str]:
    """Metric units in either direction, sometimes hours, minutes, days and weeks; worked by the factor."""
    if rng.random() < 0.1:
        source, target, factor = rng.choice(TIMES)
        value = Decimal(rng.randint(2, 40))
        result, working = value * factor, f"*{factor}"
    else:
        source, target, factor = rng.choice(UNITS)
        if rng.random() < 0.6:
            value = Decimal(rng.choice((rng.randint(1, 99) * 10, rng.randint(1, 999)))) / 10
            result, working = value * factor, f"*{factor}"
        else:
            source, target = target, source
            value = Decimal(rng.choice((rng.randint(1, 99) * factor // 10, rng.randint(1, 99) * factor)))
            result, working = value / factor, f"/{factor}"
    text = rng.choice((
        f"{_plain(value)} {source} in {target}",
        f"{_plain(value)} {source} to {target}",
        f"Convert {_plain(value)} {source} to {target}",
    ))  # fmt: skip
    return text, f"{_plain(result)} {target}", working


# How systems write each severity.
_LEVELS: dict[str, tuple[str, ...]] = {
    "error": ("ERROR", "ERR", "error"),
    "warning": ("WARN", "WARNING", "warn"),
    "info": ("INFO", "info", "NOTICE"),
    "critical": ("CRITICAL", "FATAL", "CRIT"),
}
_SERVICES = ("api", "auth", "billing", "cache", "cart", "db", "mail", "queue", "search", "web")
_EVENTS = (
    "timeout after {n} s", "retry {n} of 9", "{n} jobs left", "took {n} ms", "disk at {n} percent", "{n} users online",
    "read {n} rows", "worker {n} stopped",
)  # fmt: skip


def log_triage(rng: random.Random) -> tuple[str, str]:
    """Severity, in one spelling, and error code of a log line; its other numbers are distractions."""
    severity = rng.choice(tuple(_LEVELS))
    level, service = rng.choice(_LEVELS[severity]), rng.choice(_SERVICES)
    code = f"{rng.choice('ABCDEFGHKLMNPRTX')}{rng.randint(100, 999)}"
    event = rng.choice(_EVENTS).format(n=rng.randint(2, 99))
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    text = rng.choice((
        f"{clock} {level} {service} [{code}] {event}",
        f"{clock} [{level}] {service}: {event} ({code})",
        f"level={level} svc={service} code={code} msg=\"{event}\"",
        f"{service} {clock} {code} {level}: {event}",
    ))  # fmt: skip
    return text, f"{severity} {code}"


TASKS: tuple[GeneratedTask, ...] = (
    task(
        "date_normalisation", date_normalisation,
        description="Rewrites a date in any of ten notations as YYYY-MM-DD.",
        instruction="Write the date as YYYY-MM-DD (slashes: month/day/year, dots: day.month.year, all years 20xx).",
        max_new_tokens=14,
    ),
    task(
        "amount_normalisation", amount_normalisation,
        description="Rewrites an amount of money with two decimals and a currency code.",
        instruction="Write the amount in full with two decimals and currency code, like 1200.00 USD.",
        max_new_tokens=18,
    ),
    task(
        "field_extraction", field_extraction,
        description="Copies the e-mail address, phone number or order number from a customer's message.",
        instruction="Copy the field that is named first from the message.",
        max_new_tokens=20,
    ),
    task(
        "intent_classification", intent,
        description="Sorts a customer's message by what the customer wants.",
        instruction=f"What is the message about: {', '.join(INTENTS)}?",
        max_new_tokens=5, allowed_answers=tuple(INTENTS),
    ),
    task(
        "review_sentiment", review_sentiment,
        description="Says whether a review's two judgements are both good, both bad, or one of each.",
        instruction="Is the review positive, negative or mixed?",
        max_new_tokens=5, allowed_answers=("positive", "negative", "mixed"),
    ),
    task(
        "unit_conversion", unit_conversion,
        description="Converts a quantity between metric units or units of time.",
        instruction="Convert the quantity. Answer with number and unit.",
        max_new_tokens=24, worked=True,
    ),
    task(
        "log_triage", log_triage,
        description="Reads severity (error, warning, info, critical) and error code off a log line.",
        instruction="Give severity (error, warning, info or critical) and error code, like: error A123",
        max_new_tokens=10,
    ),
)  # fmt: skip
