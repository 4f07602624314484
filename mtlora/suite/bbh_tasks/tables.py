"""Questions about a table of penguins, and sometimes one of giraffes."""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, choose, look_up, read_options, with_options


class _Row(NamedTuple):
    """Years, centimetres, kilograms."""

    name: str
    age: int
    height: int
    weight: int

    def figure(self, column: str) -> int:
        """The figure of a column."""
        return {"age": self.age, "height": self.height, "weight": self.weight}[column]


_PENGUINS: tuple[_Row, ...] = (
    _Row("Louis", 7, 50, 11), _Row("Bernard", 5, 80, 13), _Row("Vincent", 9, 60, 11), _Row("Gwen", 8, 70, 15),
)  # fmt: skip
_JAMES = _Row("James", 12, 90, 12)
_GIRAFFES: tuple[_Row, ...] = (
    _Row("Jody", 5, 430, 620), _Row("Gladys", 10, 420, 590), _Row("Marian", 2, 310, 410), _Row("Donna", 9, 440, 650),
)  # fmt: skip
_HEADER = "name, age, height (cm), weight (kg)"
_TABLE = (
    f"Here is a table where the first line is a header and each subsequent line is a penguin:  {_HEADER} "
    + " ".join(", ".join(map(str, row)) for row in _PENGUINS)
    + "  For example: the age of Louis is 7, the weight of Gwen is 15 kg, the height of Bernard is 80 cm.  "
)
_ADDED = "We now add a penguin to the table:\nJames, 12, 90, 12\n"
_DELETED = "We then delete the penguin named Bernard from the table.\n"
_ALSO = "And here is a similar table, but listing giraffes:\n"
_OTHER = f"{_ALSO}{_HEADER}\n" + "".join(", ".join(map(str, row)) + "\n" for row in _GIRAFFES)
# superlative -> (column, whether the greatest)
_EXTREMES = {
    "oldest": ("age", True), "youngest": ("age", False), "younest": ("age", False), "tallest": ("height", True),
    "shortest": ("height", False), "heaviest": ("weight", True), "lightest": ("weight", False),
}  # fmt: skip

_NAMES = {
    "penguin": ("Louis", "Bernard", "Vincent", "Gwen", "James"),
    "giraffe": ("Jody", "Gladys", "Marian", "Donna", "Louise"),
}


class _Tables:
    """The rows that a text holds."""

    def __init__(self, text: str) -> None:
        self.penguins = [row for row in _PENGUINS if row.name != "Bernard" or "named Bernard" not in text]
        if "add a penguin" in text:
            self.penguins.append(_JAMES)
        self.giraffes = list(_GIRAFFES) if "giraffes:" in text else []

    def of(self, kind: str) -> list[_Row]:
        """Rows of `penguin`, `giraffe` or `animal`, singular or plural, or of several kinds joined by `and`."""
        kinds = {word.removesuffix("s") for word in kind.split(" and ")}
        rows = [] if kinds == {"giraffe"} else self.penguins
        return [*rows, *(self.giraffes if kinds != {"penguin"} else [])]


def _counted(rows: list[_Row], match: re.Match[str]) -> tuple[str, str]:
    """How many are above or below a limit of age (and weight): each row's figures with the running count."""
    tests = [("age", match["age_side"], int(match["age"]))]
    if match["weight"]:
        tests.append(("weight", match["weight_side"], int(match["weight"])))
    count, working = 0, []
    for row in rows:
        count += all(
            row.figure(column) > limit if side == "more" else row.figure(column) < limit
            for column, side, limit in tests
        )
        working.append(" ".join([row.name, *(str(row.figure(column)) for column, _, _ in tests), str(count)]))
    return ", ".join(working), str(count)


def _summed(rows: list[_Row], column: str) -> tuple[str, str]:
    total, working = 0, []
    for row in rows:
        total += row.figure(column)
        working.append(f"{row.name} {row.figure(column)} {total}")
    return ", ".join(working), str(total)


def _listed(rows: list[_Row], column: str) -> str:
    return " ".join(f"{row.name} {row.figure(column)}" for row in rows)


def _extreme(rows: list[_Row], word: str, second: bool) -> tuple[str, str]:
    column, greatest = _EXTREMES[word]
    row = sorted(rows, key=lambda row: row.figure(column), reverse=greatest)[int(second)]
    return f"{_listed(rows, column)}, {row.figure(column)}", row.name


def _only(rows: list[_Row], column: str, holds: Callable[[int], bool]) -> tuple[str, str]:
    found = [row for row in rows if holds(row.figure(column))]
    if len(found) != 1:
        raise UnsolvedError(f"{len(found)} rows fit")
    return f"{_listed(rows, column)}, {found[0].figure(column)}", found[0].name


def _one(rows: list[_Row], name: str) -> _Row:
    for row in rows:
        if row.name == name:
            return row
    raise UnsolvedError(f"no {name} in the table")


_YEARS = {"one": 1, "two": 2}


def _answer(tables: _Tables, question: str) -> tuple[str, str]:
    """(working, the answer's text). Raises UnsolvedError for a question of unknown form."""
    if m := re.fullmatch(
        r"How many (?P<kind>\w+) are (?P<age_side>more|less) than (?P<age>\d+) years old"
        r"(?: and weight (?P<weight_side>more|less) than (?P<weight>\d+) kg)?\?",
        question,
    ):
        return _counted(tables.of(m["kind"]), m)
    if m := re.fullmatch(r"What is the cumulated (age|weight|height) of the ([\w ]+)\?", question):
        return _summed(tables.of(m[2]), m[1])
    if m := re.fullmatch(r"What is the average (age|weight|height) of the ([\w ]+)\?", question):
        rows = tables.of(m[2])
        working, total = _summed(rows, m[1])
        return f"{working}, {total}/{len(rows)}", str(int(total) // len(rows))
    if m := re.fullmatch(r"Which is the (second )?(\w+) (penguin|giraffe)\?", question):
        if m[2] not in _EXTREMES:
            raise UnsolvedError(f"no known superlative: {m[2]!r}")
        return _extreme(tables.of(m[3]), m[2], bool(m[1]))
    if m := re.fullmatch(r"What is the name of the (fist|first|last) (\w+) sorted by alphabetic order\?", question):
        names = sorted(row.name for row in tables.of(m[2]))
        return " ".join(names), names[-1 if m[1] == "last" else 0]
    if m := re.fullmatch(r"What is the name of the (first|second|third|last) (penguin|giraffe)\?", question):
        names = [row.name for row in tables.of(m[2])]
        return " ".join(names), names[{"first": 0, "second": 1, "third": 2, "last": -1}[m[1]]]
    if m := re.fullmatch(r"What is the name of the (?:penguin that is )?(\d+) cm tall(?: penguin)?\?", question):
        tall = int(m[1])
        return _only(tables.penguins, "height", lambda height: height == tall)
    if m := re.fullmatch(r"How many (penguin|giraffe|animal)s are (?:there|listed) in the tables?\?", question):
        names = [row.name for row in tables.of(m[1])]
        return " ".join(f"{name} {i}" for i, name in enumerate(names, 1)), str(len(names))
    if m := re.fullmatch(r"What is the (age|weight|height) of (\w+)\?", question):
        value = _one(tables.of("animals"), m[2]).figure(m[1])
        return f"{m[2]} {value}", str(value)
    if m := re.fullmatch(r"Which penguin is younger than (\w+)(?: and older than (\w+))?\?", question):
        below = _one(tables.penguins, m[1]).age
        above = _one(tables.penguins, m[2]).age if m[2] else 0
        return _only(tables.penguins, "age", lambda age: above < age < below)
    if m := re.fullmatch(r"Which penguin is (one|two) years? younger than (\w+)\?", question):
        wanted = _one(tables.penguins, m[2]).age - _YEARS[m[1]]
        return _only(tables.penguins, "age", lambda age: age == wanted)
    raise UnsolvedError(f"no known question: {question!r}")


def solve_penguins(text: str) -> Solution:
    """Works through the rows asked about: their figures, running counts or sums, and the answer."""
    letters = read_options(text)
    if not text.startswith("Here is a table where the first line is a header"):
        raise UnsolvedError("no table")
    question = text.partition("\nOptions:")[0].rpartition("\n")[2].rpartition("  ")[2]
    working, found = _answer(_Tables(text), question)
    option = next((option for option in letters if re.fullmatch(rf"{found}(?: kg| cm)?", option)), found)
    if list(letters) in ([*_NAMES["penguin"]], [*_NAMES["giraffe"]], ["1", "2", "3", "4", "5"]):
        return Solution(f"{working}: {option}", choose(letters, option))
    read, answer = look_up(letters, option)
    return Solution(f"{working}: {read}", answer)


def generate_penguins(rng: random.Random) -> str:
    """One of the benchmark's tables, and a question in one of its forms."""
    while True:
        text = _draw(rng)
        try:
            solve_penguins(text)
        except UnsolvedError:
            continue
        return text


def _draw(rng: random.Random) -> str:
    table = _TABLE
    if rng.random() < 0.6:
        table += _ADDED
        if rng.random() < 0.5:
            table += _DELETED
    if giraffes := rng.random() < 0.35:
        table += _OTHER
    kind = rng.choice(("penguin", "penguin", "giraffe", "animal")) if giraffes else "penguin"
    column = rng.choice(("age", "weight"))
    form = rng.randrange(9)
    options: list[str] = ["1", "2", "3", "4", "5"]
    if form <= 1:
        question = f"How many {kind}s are {rng.choice(('more', 'less'))} than {rng.choice((5, 8, 10, 6))} years old"
        if kind == "penguin" and rng.random() < 0.5:
            question += f" and weight {rng.choice(('more', 'less'))} than {rng.choice((12, 12, 14))} kg"
        question += "?"
    elif form == 2:
        question = f"How many {kind}s are {rng.choice(('there', 'listed'))} in the table{'s' if giraffes else ''}?"
        options = ["1", "2", "3", "4", "5"] if rng.random() < 0.8 else [str(i) for i in range(4, 9)]
        options = options if kind != "animal" else [str(i) for i in rng.choice((range(5, 10), range(8, 13)))]
    elif form == 3:
        question = f"What is the cumulated {column} of the {kind}s?"
        _, right = _answer(_Tables(table), question)
        near = {int(right)}
        while len(near) < 5:
            near.add(max(1, int(right) + rng.choice((-27, -15, -12, -6, -4, -3, 3, 5, 8, 12, 15, 20, 26))))
        options = [f"{value}{' kg' if column == 'weight' and kind == 'penguin' else ''}" for value in sorted(near)]
    else:
        if kind == "animal":
            kind = "penguin"
        options = list(_NAMES[kind])
        name = rng.choice(_NAMES["penguin"])
        question = rng.choice((
            f"Which is the {rng.choice(('', '', 'second '))}{rng.choice(tuple(_EXTREMES))} {kind}?",
            f"Which is the {rng.choice(tuple(_EXTREMES))} {kind}?",
            f"What is the name of the {rng.choice(('first', 'last', 'last'))} {kind} sorted by alphabetic order?",
            f"What is the name of the {rng.choice(('first', 'second', 'last', 'last'))} {kind}?",
            f"What is the name of the penguin that is {rng.choice((50, 60, 70, 80, 90))} cm tall?",
            f"What is the name of the {rng.choice((50, 60, 70, 80, 90))} cm tall penguin?",
            f"Which penguin is younger than {name}?",
            f"Which penguin is {rng.choice(('one year', 'two years'))} younger than {name}?",
        ))  # fmt: skip
        if "penguin" in question:
            options = list(_NAMES["penguin"])
    return with_options(f"{table}{question}", options)


TASKS = (
    BBHTask(
        "penguins_in_a_table", "Answers a question about tables of penguins and giraffes.",
        solve_penguins, 144, generate_penguins,
    ),
)  # fmt: skip
