"""Everyday scenes: coloured things on a table, a day with one gap."""

import random
import re
from itertools import pairwise

from mtlora.suite.bbh_tasks.task import BBHTask, Solution, UnsolvedError, look_up, matched, read_options, with_options
from mtlora.suite.bbh_tasks.words import COLORED, COLORS, DESTINATIONS, DOINGS, WITNESSES
from mtlora.suite.derivations import clock_hour, with_article

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen",
)  # fmt: skip
_SINGULAR = {form: single for single, plural in COLORED for form in (single, plural)}
# (how many, colour, singular noun)
_Entry = tuple[int, str, str]


def _read_entries(text: str) -> list[_Entry]:
    entries = []
    for part in re.split(r", and |, | and ", text):
        entry = matched(rf"^(\w+) ({'|'.join(COLORS)}) (.+)$", part)
        count = 1 if entry[1] in ("a", "an") else _NUMBERS.index(entry[1]) if entry[1] in _NUMBERS else -1
        if count < 0 or entry[3] not in _SINGULAR:
            raise UnsolvedError(f"no coloured thing: {part!r}")
        entries.append((count, entry[2], _SINGULAR[entry[3]]))
    return entries


def _count(counted: list[tuple[str, int]]) -> tuple[str, str]:
    """(working as a running sum, the sum in words)."""
    running, working = 0, []
    for name, count in counted:
        running += count
        working.append(f"{name} {running}")
    if running >= len(_NUMBERS):
        raise UnsolvedError(f"{running} is more than any option")
    return " ".join(working) or "none", _NUMBERS[running]


def _find(entries: list[_Entry], what: str) -> int:
    """The entry that `mug` or `red thing` names."""
    for i, (_, color, noun) in enumerate(entries):
        if what == noun or what.split()[0] == color:
            return i
    raise UnsolvedError(f"no {what!r} among the things")


def solve_colored(text: str) -> Solution:
    """Works through the question; the thing, its row or a running sum; and the options up to the right one."""
    letters = read_options(text)
    stated = matched(r"^On the \w+, (?:there (?:is|are)|(?:you|I) see) (.*?)\. (.*)\nOptions", text)
    entries = _read_entries(stated[1].rpartition(": ")[2])
    question = stated[2]
    if asked := re.fullmatch(r"What color is the (.*)\?", question):
        _, color, _ = entries[_find(entries, asked[1])]
        return _chosen(letters, asked[1], "", color)
    if asked := re.fullmatch(r"Is the (.*) (\w+)\?", question):
        _, color, _ = entries[_find(entries, asked[1])]
        return _chosen(letters, asked[1], f"{color} {asked[2]}", "yes" if color == asked[2] else "no")
    if asked := re.fullmatch(r"What is the color of the (.*)\?", question):
        place = _place(entries, asked[1])
        # To find a neighbour, read the row up to both things.
        beside = re.match(r"\w+ directly to the (left|right) ", asked[1])
        last = place + 1 if beside and beside[1] == "left" else place
        row = entries[: last + 1] if beside else entries[place : place + 1]
        wanted = re.sub(r"directly to the | the|-most \w+$|^(?:item|object|thing) ", "", asked[1])
        return _chosen(letters, wanted, ", ".join(f"{c} {noun}" for _, c, noun in row), entries[place][1])
    if asked := re.fullmatch(r"How many non-(\w+) \w+ do you see to the (left|right) of the (.*)\?", question):
        place = _find(entries, asked[3])
        side = entries[:place] if asked[2] == "left" else entries[place + 1 :]
        wanted = f"{asked[2]} of {asked[3]} no {asked[1]}"
        counted = [(color, count) for count, color, _ in side if color != asked[1]]
    elif asked := re.fullmatch(r"How many \w+ are neither (\w+) nor (\w+)\?", question):
        wanted = f"no {asked[1]} {asked[2]}"
        counted = [(color, count) for count, color, _ in entries if color not in asked.groups()]
    elif asked := re.fullmatch(r"If I remove all the (.*) from the \w+, how many (.*) remain on it\?", question):
        if asked[1] in _SINGULAR:
            gone, left = _SINGULAR[asked[1]], asked[2].split()[0]
            counted = [(noun, count) for count, color, noun in entries if noun != gone and color == left]
        else:
            gone, left = asked[1].split()[0], _SINGULAR.get(asked[2], "")
            counted = [(color, count) for count, color, noun in entries if color != gone and noun == left]
        wanted = f"{left} no {gone}"
    else:
        raise UnsolvedError(f"no known question: {question!r}")
    return _chosen(letters, wanted, *_count(counted))


def _chosen(letters: dict[str, str], wanted: str, working: str, answer: str) -> Solution:
    read, letter = look_up(letters, answer)
    return Solution(f"{wanted}: {working}{', ' if working else ''}{answer}, {read}", letter)


def _place(entries: list[_Entry], where: str) -> int:
    """The entry of a row that `left-most item`, `thing directly to the left of the mug` and the like name."""
    if end := re.fullmatch(r"(left|right)-most \w+", where):
        return 0 if end[1] == "left" else len(entries) - 1
    if beside := re.fullmatch(r"\w+ directly to the (left|right) of the (.*)", where):
        place = _find(entries, beside[2]) + (1 if beside[1] == "right" else -1)
        if not 0 <= place < len(entries):
            raise UnsolvedError("nothing is there")
        return place
    if far := re.fullmatch(r"\w+ furthest from the (.*)", where):
        place = _find(entries, far[1])
        if 2 * place + 1 == len(entries):
            raise UnsolvedError("both ends are as far")
        return len(entries) - 1 if 2 * place + 1 < len(entries) else 0
    raise UnsolvedError(f"no known place: {where!r}")


def generate_colored(rng: random.Random) -> str:
    """A few things, a row of things, or several of each, and a question of one of nine kinds."""
    surface = rng.choice(("desk", "floor", "nightstand", "table"))
    word = rng.choice(("items", "objects", "things"))
    while True:
        text = _draw_colored(rng, surface, word)
        try:
            solve_colored(text)
        except UnsolvedError:
            continue
        return text


def _draw_colored(rng: random.Random, surface: str, word: str) -> str:
    options: tuple[str, ...] = COLORS
    kind = rng.choices(("remove", "row", "few"), weights=(36, 50, 38))[0]
    if kind == "remove":
        return _draw_removal(rng, surface, word)
    nouns = [
        single for single, _ in rng.sample(COLORED, rng.randint(3, 6) if kind == "row" else rng.choice((3, 3, 5, 6)))
    ]
    colors = (
        rng.sample(COLORS, len(nouns)) if kind == "row" or rng.random() < 0.7 else rng.choices(COLORS, k=len(nouns))
    )
    listed = [with_article(f"{color} {noun}") for color, noun in zip(colors, nouns, strict=True)]
    things = f"{', '.join(listed[:-1])}, and {listed[-1]}"
    if kind == "few":
        lead = rng.choice(("you see", "I see", "there is"))
        i = rng.randrange(len(nouns))
        draw = rng.random()
        if draw < 0.35:
            question = f"What color is the {nouns[i]}?"
        elif draw < 0.7:
            asked = colors[i] if rng.random() < 0.4 else rng.choice(COLORS)
            question, options = f"Is the {nouns[i]} {asked}?", ("yes", "no")
        else:
            one, other = rng.sample([*COLORS, *colors], 2)
            question, options = f"How many {word} are neither {one} nor {other}?", _NUMBERS[:7]
        return with_options(f"On the {surface}, {lead} {things}. {question}", options)
    lead = rng.choice((f"a set of {word}", f"several {word}", f"the following {word}"))
    i, single = rng.randrange(len(nouns)), word[:-1]
    that = rng.choice((nouns[i], f"{colors[i]} {single}"))
    draw = rng.random()
    if draw < 0.2:
        question = f"What is the color of the {rng.choice(('left', 'right'))}-most {single}?"
    elif draw < 0.45:
        question = f"What is the color of the {single} directly to the {rng.choice(('left', 'right'))} of the {that}?"
    elif draw < 0.65:
        question = f"What is the color of the {single} furthest from the {that}?"
    else:
        avoided = rng.choice((rng.choice(COLORS), rng.choice(colors)))
        question = f"How many non-{avoided} {word} do you see to the {rng.choice(('left', 'right'))} of the {that}?"
        options = _NUMBERS[:7]
    return with_options(f"On the {surface}, you see {lead} arranged in a row: {things}. {question}", options)


def _draw_removal(rng: random.Random, surface: str, word: str) -> str:
    forms = dict(COLORED)
    nouns = [single for single, _ in rng.sample(COLORED, rng.randint(2, 4))]
    colors = rng.sample(COLORS, rng.randint(2, 4))
    pairs = [(color, noun) for color in colors for noun in nouns]
    pairs = rng.sample(pairs, min(len(pairs), rng.randint(3, 10)))
    counts = [rng.randint(1, 3) for _ in pairs]
    listed = [
        f"{_NUMBERS[count]} {color} {noun if count == 1 else forms[noun]}"
        for count, (color, noun) in zip(counts, pairs, strict=True)
    ]
    lead = rng.choice(("you see", "I see", f"there {'is' if counts[0] == 1 else 'are'}"))
    color, noun = rng.choice(colors), rng.choice(nouns)
    if rng.random() < 0.5:
        question = f"If I remove all the {color} {word} from the {surface}, how many {forms[noun]} remain on it?"
    else:
        question = f"If I remove all the {forms[noun]} from the {surface}, how many {color} {word} remain on it?"
    things = f"{', '.join(listed[:-1])}, and {listed[-1]}"
    return with_options(f"On the {surface}, {lead} {things}. {question}", _NUMBERS)


def solve_temporal(text: str) -> Solution:
    """Works through the hours at which one stretch follows another, the gap, and the options up to it."""
    letters = read_options(text)
    reached = [matched(r"\w+ woke up at (\w+)\.", text)[1]]
    closed = matched(r" was closed after (\w+)\.", text)[1]
    for begin, end in [*re.findall(r" from (\w+) to (\w+)\.\n", text), (closed, "")]:
        if begin != reached[-1]:
            gap = f"{reached[-1]} to {begin}"
            read, answer = look_up(letters, gap)
            return Solution(f"{' '.join(reached)}, {gap}: {read}", answer)
        reached.append(end)
    raise UnsolvedError("no gap")


def generate_temporal(rng: random.Random) -> str:
    """A day of four to six stretches; somebody saw all but one."""
    count = rng.choice((3, 4, 5))
    hours = [rng.randint(5, 9)]
    bounds = sorted(rng.sample(range(hours[0] + 1, 23), count + 1))
    hours += bounds
    stretches = [f"{clock_hour(begin)} to {clock_hour(end)}" for begin, end in pairwise(hours)]
    gap = rng.randrange(len(stretches))
    who, *witnesses = rng.sample(WITNESSES, count + 1)
    place, doings = rng.choice(DESTINATIONS), iter(rng.sample(DOINGS, count))
    seen = [stretch for i, stretch in enumerate(stretches) if i != gap]
    lines = [
        f"{witness} saw {who} {next(doings)} from {stretch}." for witness, stretch in zip(witnesses, seen, strict=True)
    ]
    options = [stretches[gap], *rng.sample(seen, 3)]
    rng.shuffle(options)
    return with_options(
        "\n".join([
            f"Today, {who} went to the {place}. Between what times could they have gone?",
            "We know that:",
            f"{who} woke up at {clock_hour(hours[0])}.",
            *lines,
            f"The {place} was closed after {clock_hour(hours[-1])}.",
            f"Between what times could {who} have gone to the {place}?",
        ]),
        options,
    )  # fmt: skip


TASKS = (
    BBHTask(
        "reasoning_about_colored_objects", "Answers a question about coloured things on a table.",
        solve_colored, 96, generate_colored,
    ),
    BBHTask(
        "temporal_sequences", "Finds the one stretch of a day that nobody accounts for.",
        solve_temporal, 96, generate_temporal,
    ),
)  # fmt: skip
