"""Deduction: truth values, liars, orderings, syllogisms, brackets."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from mtlora.suite.builtin.task import GeneratedTask, enumerate_words, task
from mtlora.suite.builtin.words import BIRDS, CARS, CLASSES, GOODS, NAMES
from mtlora.suite.derivations import closed, draw_brackets, or_of_ands, with_article


def boolean_expression(rng: random.Random) -> tuple[str, str, str]:
    """Three or four operands, some negated, at most one pair of brackets; worked by reducing operands to constants."""
    wanted = rng.random() < 0.5
    while True:
        n = rng.choice((3, 4, 4, 4))
        operators = [rng.choice(("and", "or")) for _ in range(n - 1)]
        operands = [(rng.random() < 0.5, rng.random() < 0.3) for _ in range(n)]
        texts = [f"not {value}" if negated else str(value) for value, negated in operands]
        values = [value != negated for value, negated in operands]
        if rng.random() < 0.6:
            start = rng.randrange(n - 1)
            end = start + (2 if n == 3 else rng.choice((2, 2, 3)))
            if end > n:
                continue
            negated = rng.random() < 0.4
            inner = or_of_ands(values[start:end], operators[start : end - 1])
            text = texts[start]
            for operator, operand in zip(operators[start : end - 1], texts[start + 1 : end], strict=True):
                text += f" {operator} {operand}"
            texts[start:end] = [f"not ( {text} )" if negated else f"( {text} )"]
            values[start:end] = [inner != negated]
            operators[start : end - 1] = []
        if or_of_ands(values, operators) == wanted:
            text = texts[0] + "".join(f" {op} {term}" for op, term in zip(operators, texts[1:], strict=True))
            reduced = "".join(f" {op} {value}" for op, value in zip(operators, values[1:], strict=True))
            return text, str(wanted), f"{values[0]}{reduced}"


def web_of_lies(rng: random.Random) -> tuple[str, str, str]:
    """A chain of three people, each vouching for or accusing the one before; worked by who tells the truth."""
    people = rng.sample(NAMES, 3)
    honest = [rng.random() < 0.5 for _ in people]
    verb = {True: "tells the truth", False: "lies"}
    statements = [f"{people[0]} {verb[honest[0]]}."]
    for i in (1, 2):
        # A truthful person reports the predecessor's honesty, a liar its opposite.
        statements.append(f"{people[i]} says {people[i - 1]} {verb[honest[i] == honest[i - 1]]}.")
    working = " ".join(f"{person} {'yes' if true else 'no'}" for person, true in zip(people, honest, strict=True))
    return f"{' '.join(statements)} Does {people[2]} tell the truth?", "Yes" if honest[2] else "No", working


@dataclass(frozen=True, slots=True)
class _Scene:
    """A way to tell an order of three: how it is introduced, compared, placed and asked for."""

    pool: Sequence[str]
    intro: str
    noun: str
    less: str
    more: str
    at: Sequence[str]
    ask: Sequence[str]


_SCENES = (
    _Scene(
        BIRDS, "On a branch sit {a}.", "The {x}", "is to the left of the {y}", "is to the right of the {y}",
        ("is the leftmost", "is in the middle", "is the rightmost"),
        ("Which bird is the leftmost?", "Which bird is in the middle?", "Which bird is the rightmost?"),
    ),
    _Scene(
        NAMES, "{a} ran a race.", "{x}", "finished before {y}", "finished after {y}",
        ("finished first", "finished second", "finished last"),
        ("Who finished first?", "Who finished second?", "Who finished last?"),
    ),
    _Scene(
        GOODS, "A stall sells {a}.", "The {x}", "are cheaper than the {y}", "cost more than the {y}",
        ("are the cheapest", "are the second cheapest", "are the most expensive"),
        ("Which are the cheapest?", "Which are the second cheapest?", "Which are the most expensive?"),
    ),
    _Scene(
        CARS, "In a garage stand {a}.", "The {x}", "is older than the {y}", "is newer than the {y}",
        ("is the oldest", "is the second oldest", "is the newest"),
        ("Which is the oldest?", "Which is the second oldest?", "Which is the newest?"),
    ),
)  # fmt: skip

_Order = tuple[int, int, int]  # order[k] is the thing in place k
_ORDERS: tuple[_Order, ...] = tuple(permutations((0, 1, 2)))  # type: ignore[arg-type]


def _holds(clue: tuple[str, int, int], order: _Order) -> bool:
    kind, thing, other = clue
    return order.index(thing) < order.index(other) if kind == "before" else order[other] == thing


def logical_deduction(rng: random.Random) -> tuple[str, str, str]:
    """Two clues fix the order of three things; neither alone decides the question.

    Worked with the clues in one notation (`x<y`: x comes before y; `x=2`: x is second) and the order they give.
    """
    scene = rng.choice(_SCENES)
    things = rng.sample(scene.pool, 3)
    order, asked = rng.choice(_ORDERS), rng.randrange(3)
    true_clues = [("before", order[i], order[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    true_clues += [("at", order[place], place) for place in range(3)]
    while True:
        clues = rng.sample(true_clues, 2)
        fits = [o for o in _ORDERS if all(_holds(clue, o) for clue in clues)]
        decided_by_one = any(len({o[asked] for o in _ORDERS if _holds(clue, o)}) == 1 for clue in clues)
        if len(fits) == 1 and not decided_by_one:
            break
    sentences, working = [], []
    for kind, thing, other in clues:
        working.append(f"{things[thing]}={other + 1}" if kind == "at" else f"{things[thing]}<{things[other]}")
        if kind == "at":
            sentences.append(f"{scene.noun.format(x=things[thing])} {scene.at[other]}.")
        elif rng.random() < 0.5:
            sentences.append(f"{scene.noun.format(x=things[thing])} {scene.less.format(y=things[other])}.")
        else:
            sentences.append(f"{scene.noun.format(x=things[other])} {scene.more.format(y=things[thing])}.")
    names = things if scene.pool in (NAMES, GOODS) else list(map(with_article, things))
    intro = scene.intro.format(a=enumerate_words(names))
    working.append(" ".join(things[i] for i in order))
    return f"{intro} {' '.join(sentences)} {scene.ask[asked]}", things[order[asked]], ", ".join(working)


# (quantifier, subject, predicate) of two premises and the conclusion. Valid means true in every model, also with empty
# classes. Forms that hold only if some class is not empty are left out: logicians disagree on them.
# The invalid forms use the same quantifiers as the valid ones: only the places of the classes decide.
_Form = tuple[tuple[str, str, str], tuple[str, str, str], tuple[str, str, str]]
VALID_FORMS: tuple[_Form, ...] = (
    (("all", "A", "B"), ("all", "B", "C"), ("all", "A", "C")),
    (("all", "A", "B"), ("no", "B", "C"), ("no", "A", "C")),
    (("no", "A", "B"), ("all", "C", "B"), ("no", "A", "C")),
    (("some", "A", "B"), ("all", "B", "C"), ("some", "A", "C")),
    (("some", "A", "B"), ("no", "B", "C"), ("some not", "A", "C")),
    (("all", "A", "B"), ("some not", "C", "B"), ("some not", "C", "A")),
)
INVALID_FORMS: tuple[_Form, ...] = (
    (("all", "A", "B"), ("all", "C", "B"), ("all", "A", "C")),
    (("all", "A", "B"), ("no", "A", "C"), ("no", "B", "C")),
    (("no", "A", "B"), ("all", "B", "C"), ("no", "A", "C")),
    (("all", "A", "B"), ("some", "B", "C"), ("some", "A", "C")),
    (("no", "A", "B"), ("some", "B", "C"), ("some not", "A", "C")),
    (("all", "A", "B"), ("some not", "B", "C"), ("some not", "A", "C")),
)
_QUANTIFIERS = {
    "all": "all {s} are {p}", "no": "no {s} are {p}", "some": "some {s} are {p}", "some not": "some {s} are not {p}",
}  # fmt: skip


def syllogism(rng: random.Random) -> tuple[str, str, str]:
    """Two premises and a conclusion, of twelve forms.

    Worked with letters for the classes: S and P are subject and predicate of the conclusion, M the class in between.
    A capital marks a distributed term: the statement is about its whole class. One of these forms is valid if a premise
    distributes M, and if a premise distributes each term that the conclusion distributes.
    """
    valid = rng.random() < 0.5
    form = rng.choice(VALID_FORMS if valid else INVALID_FORMS)
    classes = dict(zip("ABC", rng.sample(CLASSES, 3), strict=True))
    first, second, conclusion = (_QUANTIFIERS[q].format(s=classes[s], p=classes[p]) for q, s, p in form)
    _, subject, predicate = form[2]
    letters = {subject: "S", predicate: "P"}
    statements = [_distributed(q, letters.get(s, "M"), letters.get(p, "M")) for q, s, p in form]
    if rng.random() < 0.5:
        first, second = second, first
        statements[:2] = reversed(statements[:2])
    text = f"{first.capitalize()}. {second.capitalize()}. Therefore, {conclusion}."
    needed = "M" + "".join(letter for letter in "SP" if letter in statements[2])
    checks = [f"{letter} {'yes' if letter in ' '.join(statements[:2]) else 'no'}" for letter in needed]
    return text, "valid" if valid else "invalid", f"{', '.join(statements)}: {' '.join(checks)}"


def _distributed(quantifier: str, subject: str, predicate: str) -> str:
    """A statement with capitals for the terms that it distributes."""
    subject = subject if quantifier in ("all", "no") else subject.lower()
    predicate = predicate if quantifier in ("no", "some not") else predicate.lower()
    return f"{quantifier} {subject} {predicate}"


def bracket_completion(rng: random.Random) -> tuple[str, str]:
    """A prefix of four to nine brackets that one to three closing ones complete."""
    wanted = rng.randint(1, 3)
    while True:
        symbols, stack = draw_brackets(rng, rng.randint(4, 9), 0.45)
        if len(stack) == wanted:
            return " ".join(symbols), closed(stack)


TASKS: tuple[GeneratedTask, ...] = (
    task(
        "boolean_expressions", boolean_expression,
        description="Evaluates a boolean expression of three or four operands.",
        instruction="Is the boolean expression True or False?",
        max_new_tokens=16, allowed_answers=("True", "False"), worked=True,
    ),
    task(
        "web_of_lies", web_of_lies,
        description="Says whether the last of three people, who vouch for or accuse one another, tells the truth.",
        instruction="Everyone always lies or always tells the truth. Answer Yes or No.",
        max_new_tokens=24, allowed_answers=("Yes", "No"), worked=True,
    ),
    task(
        "logical_deduction", logical_deduction,
        description="Finds the order of three things from two clues and names the one in the place asked for.",
        instruction="Work out the order and name the one asked for.",
        max_new_tokens=48, worked=True,
    ),
    task(
        "syllogisms", syllogism,
        description="Says whether a conclusion follows from two quantified premises.",
        instruction="Is the argument deductively valid or invalid?",
        max_new_tokens=32, allowed_answers=("valid", "invalid"), worked=True,
    ),
    task(
        "bracket_completion", bracket_completion,
        description="Closes the open brackets of a sequence in the right order.",
        instruction="Write the closing brackets that complete the sequence, separated by spaces.",
        max_new_tokens=10,
    ),
)  # fmt: skip
