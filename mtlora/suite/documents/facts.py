"""The facts of a generated document, drawn before its text is written."""

import datetime
import json
import random
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

MATERIAL: Final[dict[str, Any]] = json.loads(Path(__file__).with_name("material.json").read_text())
KINDS: Final = tuple(MATERIAL["titles"])
CURRENCIES: Final = ("USD", "EUR", "GBP")
# Probability that an optional fact is missing.
_MISSING = 0.2


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a list of goods."""

    name: str
    quantity: int
    price: Decimal


@dataclass(frozen=True)
class Facts:
    """The facts of a document; None for a missing fact."""

    kind: str
    sender: str
    recipient: str
    date: datetime.date
    reference: str
    people: tuple[str, ...]
    items: tuple[Item, ...]
    topic: str
    priority: str
    decision: str
    attachment: str
    reply: str
    satisfaction: str
    company: str | None
    city: str | None
    email: str | None
    phone: str | None
    cost_centre: str | None
    product: str | None
    due: datetime.date | None
    total: Decimal | None
    currency: str
    # Distracting names and dates, which no question asks for.
    other_people: tuple[str, ...]
    other_dates: tuple[datetime.date, ...]

    @property
    def team(self) -> str:
        """The team that looks after the topic."""
        return str(MATERIAL["topics"][self.topic]["team"])


def draw_facts(rng: random.Random) -> Facts:
    """The facts of one document."""

    def maybe(value: Any, missing: float = _MISSING) -> Any:
        return None if rng.random() < missing else value

    names = [
        f"{first} {last}"
        for first, last in zip(
            rng.sample(MATERIAL["first_names"], 10), rng.sample(MATERIAL["last_names"], 10), strict=True
        )
    ]
    sender, recipient, *others = names
    date = datetime.date(2016, 1, 1) + datetime.timedelta(days=rng.randrange(14 * 365))
    items = tuple(
        Item(name, quantity, Decimal(rng.randint(200, 39_999)) / 100)
        for name, quantity in zip(
            rng.sample(MATERIAL["products"], rng.randint(1, 6)), rng.sample(range(2, 40), 6), strict=False
        )
    )
    total = Decimal(rng.choice((rng.randint(1_000, 99_999), rng.randint(100_000, 899_999)))) / 100
    first, _, last = sender.lower().partition(" ")
    return Facts(
        kind=rng.choice(KINDS),
        sender=sender,
        recipient=recipient,
        date=date,
        reference=f"{''.join(rng.choices('ABCDEFGHKLMNPRSTX', k=2))}-{rng.randint(1000, 9999)}",
        people=tuple(others[: rng.randint(1, 5)]),
        items=items,
        topic=rng.choice(tuple(MATERIAL["topics"])),
        priority=rng.choice(tuple(MATERIAL["priority"])),
        decision=rng.choice(tuple(MATERIAL["decision"])),
        attachment=rng.choice(("yes", "no")),
        reply=rng.choice(("yes", "no")),
        satisfaction=rng.choice(tuple(MATERIAL["satisfaction"])),
        company=maybe(rng.choice(MATERIAL["companies"])),
        city=maybe(rng.choice(MATERIAL["cities"])),
        email=maybe(f"{rng.choice((first, last, f'{first}.{last}'))}@{rng.choice(MATERIAL['domains'])}"),
        phone=maybe(f"555-{rng.randint(0, 9999):04}"),
        cost_centre=maybe(str(rng.randint(100, 999))),
        product=maybe(rng.choice(MATERIAL["products"])),
        due=maybe(date + datetime.timedelta(days=rng.randint(3, 120)), 2 * _MISSING),
        total=maybe(total),
        currency=rng.choice(CURRENCIES),
        other_people=tuple(others[5:]),
        other_dates=tuple(date - datetime.timedelta(days=rng.randint(20, 900)) for _ in range(3)),
    )
