"""Numbers: counting, arithmetic, lists, sequences."""

import random

from mtlora.suite.builtin.task import GeneratedTask, enumerate_words, split_sum, task
from mtlora.suite.builtin.words import KINDS, NUMBER_WORDS, WORDS
from mtlora.suite.derivations import with_article

_COUNTS = tuple(str(n) for n in range(2, 10))


def object_counting(rng: random.Random) -> tuple[str, str, str]:
    """How many things of one kind, among one or two entries of another; worked as a running sum."""
    total = rng.randint(2, 9)
    parts = rng.choice([n for n in (2, 3) if n <= total <= 4 * n])
    kind, other = rng.sample(sorted(KINDS), 2)
    others = 1 if parts == 3 else rng.choice((1, 2))
    counts = split_sum(rng, total, parts, 4) + [rng.randint(1, 4) for _ in range(others)]
    things = rng.sample(KINDS[kind], parts) + rng.sample(KINDS[other], others)
    entries = list(zip(counts, things, strict=True))
    rng.shuffle(entries)
    phrases, working, running = [], [], 0
    for count, (single, plural) in entries:
        phrases.append(with_article(single) if count == 1 else f"{NUMBER_WORDS[count]} {plural}")
        if (single, plural) in KINDS[kind]:
            running += count
            working.append(f"{single if count == 1 else plural} {running}")
    return f"I have {enumerate_words(phrases)}. How many {kind} do I have?", str(total), " ".join(working)


def _apply(a: int, operator: str, b: int) -> int:
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def _equation(a: int, operator: str, b: int) -> str:
    return f"{a}{operator}{b}={_apply(a, operator, b)}"


def multistep_arithmetic(rng: random.Random) -> tuple[str, str, str]:
    """Two operations on three digits; a product has 2 or 3 as one factor, and results lie in -5 to 20.

    Worked as the two equations in the order in which they are solved.
    """
    wanted = rng.randint(-5, 20)
    while True:
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        first, second = rng.choice(("++", "+-", "-+", "--", "+*", "*+", "-*", "*-"))
        if first == "*":
            a = rng.choice((2, 3))
        elif second == "*":
            c = rng.choice((2, 3))
        left, right = _apply(_apply(a, first, b), second, c), _apply(a, first, _apply(b, second, c))
        from_left = f"{_equation(a, first, b)} {_equation(_apply(a, first, b), second, c)}"
        from_right = f"{_equation(b, second, c)} {_equation(a, first, _apply(b, second, c))}"
        text, value, working = rng.choice((
            (f"({a} {first} {b}) {second} {c}", left, from_left),
            (f"{a} {first} ({b} {second} {c})", right, from_right),
            (f"{a} {first} {b} {second} {c}", *((right, from_right) if second == "*" else (left, from_left))),
        ))  # fmt: skip
        if value == wanted:
            return text, str(value), working


_PLACES = ("first", "second", "third")


def list_operation(rng: random.Random) -> tuple[str, str]:
    """The largest, smallest, n-th or last of three to five two-digit numbers."""
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    draw = rng.random()
    if draw < 0.3:
        name, answer = "largest", max(numbers)
    elif draw < 0.6:
        name, answer = "smallest", min(numbers)
    elif draw < 0.7:
        name, answer = "last", numbers[-1]
    else:
        place = rng.randrange(3)
        name, answer = _PLACES[place], numbers[place]
    return f"{name} of {', '.join(map(str, numbers))}", str(answer)


def sequence_continuation(rng: random.Random) -> tuple[str, str, str]:
    """An arithmetic progression, worked by its step, or a repeating pattern of two or three words, by its period."""
    if rng.random() < 0.4:
        while True:
            start, step, shown = rng.randint(1, 99), rng.randint(1, 12) * rng.choice((1, -1)), rng.randint(3, 5)
            terms = [start + step * i for i in range(shown + 1)]
            if 0 <= terms[-1] <= 120:
                break
        items = [str(term) for term in terms]
        working = f"{step:+}"
    else:
        words = rng.sample(WORDS, 3)
        # One period of the pattern. No period repeats a shorter one, so the next item is certain.
        period = rng.choice(((0, 1), (0, 1, 2), (0, 0, 1), (0, 1, 1)))
        shown = 2 * len(period) + rng.randint(0, len(period) - 1)
        items = [words[period[i % len(period)]] for i in range(shown + 1)]
        working = " ".join(words[i] for i in period)
    return ", ".join([*items[:-1], "?"]), items[-1], working


TASKS: tuple[GeneratedTask, ...] = (
    task(
        "object_counting", object_counting,
        description="Counts the things of one kind in a list of possessions.",
        instruction="Answer with a number.",
        max_new_tokens=48, allowed_answers=_COUNTS, worked=True,
    ),
    task(
        "multistep_arithmetic", multistep_arithmetic,
        description="Evaluates an arithmetic expression of two operations on small numbers.",
        instruction="Calculate the result. Answer with a number.",
        max_new_tokens=32, worked=True,
    ),
    task(
        "list_operations", list_operation,
        description="Picks the largest, smallest, first, second, third or last number of a list.",
        instruction="Which number is asked for?",
        max_new_tokens=5,
    ),
    task(
        "sequence_continuation", sequence_continuation,
        description="Continues an arithmetic progression or a repeating pattern of words.",
        instruction="Which item comes next in place of the question mark?",
        max_new_tokens=16, worked=True,
    ),
)  # fmt: skip
