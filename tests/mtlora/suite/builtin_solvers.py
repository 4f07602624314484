"""Independent solvers of every built-in task: they find the answer from the text alone, by other means."""

import datetime
import itertools
import re
from collections.abc import Callable
from fractions import Fraction

from mtlora.suite.builtin.business import BLAME, INTENTS, PRAISE
from mtlora.suite.builtin.words import ADJECTIVES, KINDS


def boolean_expressions(text: str) -> str:
    assert re.fullmatch(r"(True|False|not|and|or|[()]| )+", text)
    return str(eval(text))


def web_of_lies(text: str) -> str:
    base = re.match(r"(\w+) (lies|tells the truth)\.", text)
    says = re.findall(r"(\w+) says (\w+) (lies|tells the truth)\.", text)
    asked = re.search(r"Does (\w+) tell", text)
    assert base is not None
    assert asked is not None
    assert len(says) == 2
    people = sorted({base[1], *(name for a, b, _ in says for name in (a, b))})
    answers = set()
    for honest in itertools.product((True, False), repeat=len(people)):
        is_honest = dict(zip(people, honest, strict=True))
        fits = is_honest[base[1]] == (base[2] != "lies")
        # What a person says is true exactly if the person is honest.
        fits = fits and all((is_honest[b] == (verb != "lies")) == is_honest[a] for a, b, verb in says)
        if fits:
            answers.add("Yes" if is_honest[asked[1]] else "No")
    (answer,) = answers
    return answer


_LESS = ("is to the left of", "finished before", "are cheaper than", "is older than")
_MORE = ("is to the right of", "finished after", "cost more than", "is newer than")
_PLACES = (
    ("leftmost", "first", "the cheapest", "the oldest"),
    ("in the middle", "second", "the second cheapest", "the second oldest"),
    ("rightmost", "last", "the most expensive", "the newest"),
)


def _place(sentence: str) -> int:
    """The place that a sentence is about: its longest match, because `second oldest` contains `oldest`."""
    matches = [(len(word), place) for place, words in enumerate(_PLACES) for word in words if word in sentence]
    return max(matches)[1]


def logical_deduction(text: str) -> str:
    intro, *clues, question, end = re.split(r"(?<=[.?]) ", text + " ")
    assert end == ""
    assert len(clues) == 2
    names = re.sub(r"^(On a branch sit|A stall sells|In a garage stand) | ran a race\.$|\.$", "", intro)
    things = [re.sub(r"^an? ", "", name) for name in re.split(r", | and ", names)]
    assert len(set(things)) == 3

    def holds(clue: str, order: tuple[str, ...]) -> bool:
        at = {thing: m.start() for thing in things if (m := re.search(rf"\b{thing}\b", clue))}
        first, *rest = sorted(at, key=lambda thing: at[thing])
        if not rest:
            return order[_place(clue)] == first
        before = order.index(first) < order.index(rest[0])
        assert any(phrase in clue for phrase in _LESS + _MORE)
        return before if any(phrase in clue for phrase in _LESS) else not before

    place, orders = _place(question), list(itertools.permutations(things))
    for clue in clues:
        assert len({order[place] for order in orders if holds(clue, order)}) > 1, "one clue alone decides"
    (order,) = [order for order in orders if all(holds(clue, order) for clue in clues)]
    return order[place]


def syllogisms(text: str) -> str:
    sentences = re.findall(r"(all|no|some) (\w+) are (not )?(\w+)", text.lower())
    assert len(sentences) == 3
    classes = sorted({word for _, s, _, p in sentences for word in (s, p)})
    assert len(classes) == 3
    # A model says which of the eight kinds of member (in or out of each class) exist.
    kinds = [set(itertools.compress(classes, bits)) for bits in itertools.product((0, 1), repeat=3)]

    def true(sentence: tuple[str, ...], members: list[set[str]]) -> bool:
        quantifier, s, negated, p = sentence
        if quantifier == "all":
            return all(p in m for m in members if s in m)
        if quantifier == "no":
            return not any(s in m and p in m for m in members)
        return any(s in m and (p in m) != bool(negated) for m in members)

    for exists in itertools.product((0, 1), repeat=8):
        members = list(itertools.compress(kinds, exists))
        if true(sentences[0], members) and true(sentences[1], members) and not true(sentences[2], members):
            return "invalid"
    return "valid"


def bracket_completion(text: str) -> str:
    left = text.replace(" ", "")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", left)) != left:
        left = shorter
    assert re.fullmatch(r"[(\[{<]+", left)
    return " ".join(left[::-1].translate(str.maketrans("([{<", ")]}>")))


def object_counting(text: str) -> str:
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
    entries = re.findall(r"\b(an?|two|three|four) (\w+)", text.split(".")[0])
    asked = re.search(r"How many (\w+) do", text)
    assert asked is not None
    words = {word for pair in KINDS[asked[1]] for word in pair}
    assert all(sum(word in pair for kind in KINDS.values() for pair in kind) == 1 for _, word in entries)
    return str(sum(numbers[number] for number, word in entries if word in words))


def multistep_arithmetic(text: str) -> str:
    assert re.fullmatch(r"[0-9+*() -]+", text)
    return str(eval(text))


def list_operations(text: str) -> str:
    name, items = text.split(" of ")
    numbers = [int(item) for item in items.split(", ")]
    by_size = sorted(numbers)
    places = {"first": 0, "second": 1, "third": 2, "last": -1}
    return str(numbers[places[name]] if name in places else by_size[0 if name == "smallest" else -1])


def sequence_continuation(text: str) -> str:
    *items, end = text.split(", ")
    assert end == "?"
    if items[0].isdigit():
        numbers = [int(item) for item in items]
        (step,) = {b - a for a, b in itertools.pairwise(numbers)}
        return str(numbers[-1] + step)
    period = next(p for p in range(1, len(items)) if all(a == b for a, b in zip(items, items[p:], strict=False)))
    assert 2 * period <= len(items), "the pattern is not seen twice"
    return items[len(items) % period]


def word_sorting(text: str) -> str:
    words = text.split()
    out: list[str] = []
    while words:
        out.append(min(words))
        words.remove(out[-1])
    return " ".join(out)


def string_operations(text: str) -> str:
    name, items = text.split(": ")
    if name == "reverse":
        return " ".join(reversed(items.split()))
    return " ".join(re.findall(r"\b\w" if name == "first letters" else r"\w\b", items))


def hyperbaton(text: str) -> str:
    rank = {word: i for i, words in enumerate(ADJECTIVES) for word in words}
    assert len(rank) == sum(map(len, ADJECTIVES)), "an adjective of two classes"
    options = text.split("; ")
    assert sorted(options[0].split()) == sorted(options[1].split())
    (answer,) = [o for o in options if all(rank[a] < rank[b] for a, b in itertools.pairwise(o.split()[:-1]))]
    return answer


def navigate(text: str) -> str:
    directions = {"left": -1, "right": 1, "forward": 1j, "backward": -1j}
    moves = re.findall(r"(\d+) steps? (\w+)", text)
    assert 3 <= len(moves) <= 5
    return "Yes" if sum(int(steps) * directions[direction] for steps, direction in moves) == 0 else "No"


def tracking_shuffled_objects(text: str) -> str:
    holders = re.findall(r"(\w+) has the (\w+)", text)
    asked = re.search(r"What does (\w+) have", text)
    swaps = re.findall(r"(\w+) and (\w+) swap", text)
    assert asked is not None
    assert len(swaps) == 2
    assert len(holders) == 3
    # Backwards: whose thing at the start does the person have at the end?
    owner = asked[1]
    for a, b in reversed(swaps):
        owner = b if owner == a else a if owner == b else owner
    return dict(holders)[owner]


def table_lookup(text: str) -> str:
    _, *lines, question = text.split("\n")
    rows = [(name, int(age), int(height)) for name, age, height in (line.split(", ") for line in lines)]
    for column in (0, 1, 2):
        assert len({row[column] for row in rows}) == 3
    if match := re.fullmatch(r"How (old|tall) is (\w+)\?", question):
        (row,) = [row for row in rows if row[0] == match[2]]
        return str(row[1 if match[1] == "old" else 2])
    if match := re.fullmatch(r"Who is (\d+) (years old|cm tall)\?", question):
        (row,) = [row for row in rows if row[1 if match[2] == "years old" else 2] == int(match[1])]
        return row[0]
    column, pick = {"oldest": (1, -1), "youngest": (1, 0), "tallest": (2, -1), "shortest": (2, 0)}[question[11:-1]]
    return sorted(rows, key=lambda row: row[column])[pick][0]


def colored_objects(text: str) -> str:
    row, question = text.removeprefix("In a row, left to right: ").split(". ")
    things = [(m[1], m[2]) for m in re.finditer(r"an? (\w+) (\w+)", row)]
    names = [name for _, name in things]
    assert len(things) == 4 == len(set(names))
    if "leftmost" in question:
        place = 0
    elif "rightmost" in question:
        place = 3
    else:
        match = re.search(r"is the (?:item directly (left|right) of the )?(\w+)\?", question)
        assert match is not None
        place = names.index(match[2]) + {None: 0, "left": -1, "right": 1}[match[1]]
    assert place >= 0
    return things[place][0]


def date_arithmetic(text: str) -> str:
    match = re.fullmatch(r"Today is (\d\d)/(\d\d)/(\d{4})\. What (is|was) the date (.+)\?", text)
    assert match is not None
    month, day, year = (int(part) for part in match.groups()[:3])
    when = match[5]
    assert (match[4] == "was") == (when == "yesterday" or when.endswith("ago"))
    sign = -1 if match[4] == "was" else 1
    if "year" in when:
        year += sign
    elif "month" in when:
        month += sign
        year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    else:
        number = re.search(r"\d", when)
        days = 7 if "week" in when else int(number[0]) if number else 1
        then = datetime.date(year, month, day) + datetime.timedelta(days=sign * days)
        year, month, day = then.year, then.month, then.day
    return datetime.date(year, month, day).strftime("%m/%d/%Y")


def temporal_sequences(text: str) -> str:
    def hour(text: str) -> int:
        return int(text[:-2]) % 12 + (12 if text.endswith("pm") else 0)

    spans = [(hour(a), hour(b)) for a, b in re.findall(r"(\d+[ap]m) to (\d+[ap]m)", text)]
    (start, end), *busy = spans
    taken = [h for a, b in busy for h in range(a, b)]
    assert len(taken) == len(set(taken))
    assert set(taken) < set(range(start, end))
    free = sorted(set(range(start, end)) - set(taken))
    assert free == list(range(free[0], free[-1] + 1)), "two free stretches"
    names = ["12am", *(f"{h}am" for h in range(1, 12)), "12pm", *(f"{h}pm" for h in range(1, 12))]
    return f"{names[free[0]]} to {names[free[-1] + 1]}"


def date_normalisation(text: str) -> str:
    plain = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", text).removeprefix("the ").replace(" of ", " ").replace(",", "")
    readings = set()
    for form in ("%B %d %Y", "%b %d %Y", "%d %B %Y", "%d %b %Y", "%A %d %B %Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%b-%y"):
        try:
            date = datetime.datetime.strptime(plain, form)
        except ValueError:
            continue
        if "%A" in form:
            assert date.strftime("%A") == plain.split()[0]
        readings.add(date.strftime("%Y-%m-%d"))
    (answer,) = readings
    return answer


def amount_normalisation(text: str) -> str:
    signs = {"$": "USD", "dollars": "USD", "€": "EUR", "euros": "EUR", "£": "GBP", "pounds": "GBP"}
    codes = {signs.get(word, word) for word in re.findall(r"[$€£]|USD|EUR|GBP|dollars|euros|pounds", text)}
    (code,) = codes
    number = re.search(r"([\d,]+)(?:\.(\d+))?(k| thousand|m| million)?\b", text)
    assert number is not None
    decimals = number[2] or ""
    scale = {None: 1, "k": 10**3, " thousand": 10**3, "m": 10**6, " million": 10**6}[number[3]]
    cents = int(number[1].replace(",", "") + decimals) * 100 * scale // 10 ** len(decimals)
    return f"{cents // 100}.{cents % 100:02} {code}"


def field_extraction(text: str) -> str:
    asked, message = text.split(": ", 1)
    pattern = {"email": r"[\w.]+@\w+\.\w+", "phone": r"\b\d{3}-\d{4}\b", "order": r"\b[A-Z]-\d{4}\b"}[asked]
    (answer,) = re.findall(pattern, message)
    return str(answer)


def intent_classification(text: str) -> str:
    found = set()
    for intent, phrases in INTENTS.items():
        for request in phrases["requests"]:
            pattern = re.escape(request).replace(r"\{p\}", r"\w+")
            if re.search(rf"(^|\W){pattern}(\W|$)", text, re.IGNORECASE):
                found.add(intent)
    (answer,) = found
    return answer


def review_sentiment(text: str) -> str:
    good = sum(text.count(phrase) for phrase in PRAISE)
    bad = sum(text.count(phrase) for phrase in BLAME)
    assert good + bad == 2
    return ("negative", "mixed", "positive")[good]


def unit_conversion(text: str) -> str:
    in_base = {
        "km": Fraction(1000), "m": Fraction(1), "cm": Fraction(1, 100), "mm": Fraction(1, 1000),
        "t": Fraction(1_000_000), "kg": Fraction(1000), "g": Fraction(1), "l": Fraction(1), "ml": Fraction(1, 1000),
        "weeks": Fraction(604_800), "days": Fraction(86_400), "h": Fraction(3600), "min": Fraction(60),
        "s": Fraction(1),
    }  # fmt: skip
    match = re.fullmatch(r"(?:Convert )?([\d.]+) (\w+) (?:in|to) (\w+)", text)
    assert match is not None
    value = Fraction(match[1]) * in_base[match[2]] / in_base[match[3]]
    number = str(value) if value.denominator == 1 else str(float(value))
    return f"{number} {match[3]}"


def log_triage(text: str) -> str:
    (code,) = re.findall(r"\b[A-Z]\d{3}\b", text)
    levels = {"FATAL": "critical", "CRIT": "critical", "ERR": "error", "WARN": "warning", "INFO": "info"}
    levels["NOTICE"] = "info"
    words = re.findall(r"\w+", text.upper())
    (severity,) = {name for level, name in levels.items() if any(word.startswith(level) for word in words)}
    return f"{severity} {code}"


SOLVERS: dict[str, Callable[[str], str]] = {
    solver.__name__: solver
    for solver in (
        boolean_expressions, web_of_lies, logical_deduction, syllogisms, bracket_completion, object_counting,
        multistep_arithmetic, list_operations, sequence_continuation, word_sorting, string_operations, hyperbaton,
        navigate, tracking_shuffled_objects, table_lookup, colored_objects, date_arithmetic, temporal_sequences,
        date_normalisation, amount_normalisation, field_extraction, intent_classification, review_sentiment,
        unit_conversion, log_triage,
    )
}  # fmt: skip
