"""Solvers and generators of BIG-Bench Hard's tasks: right by independent checks, readable, in the files' form."""

import datetime
import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.suite import GeneratedBBHSuite, SuiteError, split_of
from mtlora.suite.base import ANSWER_MARKER
from mtlora.suite.bbh_generated import bbh_spec, with_working
from mtlora.suite.bbh_tasks import BBH_TASKS, UnsolvedError
from mtlora.suite.bbh_tasks.task import read_options, with_options

SUITE = GeneratedBBHSuite()
some_task = st.sampled_from([task.id for task in SUITE.tasks])

COUNTS = "12345"
NAMES = ("Louis", "Bernard", "Vincent", "Gwen", "James")


def _penguins(question: str, options: Sequence[str]) -> str:
    table = (
        "Here is a table where the first line is a header and each subsequent line is a penguin:  name, age, height "
        "(cm), weight (kg) Louis, 7, 50, 11 Bernard, 5, 80, 13 Vincent, 9, 60, 11 Gwen, 8, 70, 15  For example: the "
        "age of Louis is 7, the weight of Gwen is 15 kg, the height of Bernard is 80 cm.  We now add a penguin to the "
        "table:\nJames, 12, 90, 12\n"
    )
    return with_options(f"{table}{question}", options)


# The form of the public files: (task, input, working, answer).
KNOWN = [
    ("boolean_expressions", "not not False and not not not False is", "False and True", "False"),
    ("boolean_expressions", "False or not ( True and False ) is", "False or True", "True"),
    (
        "web_of_lies",
        "Question: Ann lies. Bo says Ann lies. Cy says Bo lies. Di says Cy tells the truth. Ed says Di lies. "
        "Does Ed tell the truth?",
        "Ann no Bo yes Cy no Di no Ed yes",
        "Yes",
    ),
    (
        "dyck_languages",
        "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: { [ < > ( )",
        "{ [",
        "] }",
    ),
    (
        "object_counting",
        "I have a carrot, three stalks of celery, a snake, and two heads of broccoli. How many vegetables do I have?",
        "carrot 1 celery 4 broccoli 6",
        "6",
    ),
    ("object_counting", "I have a car, and a toaster. How many objects do I have?", "car 1 toaster 2", "2"),
    (
        "multistep_arithmetic_two",
        "((5 * -2 + 8 * 1) * (9 + -3 * -8 - -5)) =",
        "5*-2=-10 8*1=8 -10+8=-2; -3*-8=24 9+24=33 33--5=38; -2*38=-76",
        "-76",
    ),
    (
        "navigate",
        "If you follow these instructions, do you return to the starting point? Take 2 steps. Turn right. "
        "Take 1 step. Turn around.\nOptions:\n- Yes\n- No",
        "N2 E E1 W, N2 S0 differ, E1 W0 differ",
        "No",
    ),
    (
        "navigate",
        "If you follow these instructions, do you return to the starting point? Always face forward. "
        "Take 7 steps left. Take 7 steps right.\nOptions:\n- Yes\n- No",
        "W7 E7, N0 S0 same, E7 W7 same",
        "Yes",
    ),
    (
        "tracking_shuffled_objects_three_objects",
        "Alice, Bob, and Claire are playing a game. At the start of the game, they are each holding a ball: Alice has "
        "a blue ball, Bob has a black ball, and Claire has a pink ball.\nAs the game progresses, pairs of players "
        "trade balls. First, Claire and Bob swap balls. Then, Bob and Alice swap balls. Finally, Claire and Alice "
        "swap balls. At the end of the game, Alice has the\nOptions:\n(A) blue ball\n(B) black ball\n(C) pink ball",
        "Alice A Bob B Claire C, Claire B Bob C, Bob A Alice C, Claire C Alice B, Alice B",
        "(B)",
    ),
    (
        "logical_deduction_three_objects",
        "The following paragraphs each describe a set of three objects arranged in a fixed order. The statements are "
        "logically consistent within each paragraph. In an antique car show, there are three vehicles: a convertible, "
        "a station wagon, and a truck. The truck is the newest. The station wagon is older than the convertible.\n"
        "Options:\n(A) The convertible is the second-newest\n(B) The station wagon is the second-newest\n"
        "(C) The truck is the second-newest",
        "truck=3, station wagon<convertible: station wagon convertible truck, convertible: A convertible",
        "(A)",
    ),
    ("word_sorting", "Sort the following words alphabetically: List: syndrome therefrom", "", "syndrome therefrom"),
    (
        "hyperbaton",
        "Which sentence has the correct adjective order:\nOptions:\n(A) old silver lovely monkey\n"
        "(B) lovely old silver monkey",
        "old 3 silver 7 lovely 1",
        "(B)",
    ),
    (
        "temporal_sequences",
        "Today, Leslie went to the beach. Between what times could they have gone?\nWe know that:\n"
        "Leslie woke up at 5am.\nRichard saw Leslie working at the office from 5am to 7am.\n"
        "Jason saw Leslie waiting at the airport from 11am to 6pm.\nThe beach was closed after 6pm.\n"
        "Between what times could Leslie have gone to the beach?\nOptions:\n(A) 11am to 6pm\n(B) 7am to 11am",
        "5am 7am, 7am to 11am: A 11am to 6pm B 7am to 11am",
        "(B)",
    ),
    (
        "reasoning_about_colored_objects",
        "On the table, you see several things arranged in a row: a blue plate, a grey cup, and an orange pen. How many "
        "non-grey things do you see to the right of the plate?\nOptions:\n(A) zero\n(B) one\n(C) two",
        "right of plate no grey: orange 1, one, A zero B one",
        "(B)",
    ),
    (
        "reasoning_about_colored_objects",
        "On the desk, there are three black sheets of paper, two black cups, and one brown cup. If I remove all the "
        "sheets of paper from the desk, how many black objects remain on it?\nOptions:\n(A) zero\n(B) one\n(C) two",
        "black no sheet of paper: cup 2, two, A zero B one C two",
        "(C)",
    ),
    (
        "date_understanding",
        "Today is Apr 10, 1985. Jane's appointment will be 3 days later. What is the date one week ago from today in "
        "MM/DD/YYYY?\nOptions:\n(A) 04/03/1985\n(B) 04/10/1985",
        "04/10/1985, 04/03/1985: A 04/03/1985",
        "(A)",
    ),
    (
        "date_understanding",
        "Jane is celebrating the last day of Jan 2012. What is the date a month ago in MM/DD/YYYY?\nOptions:\n"
        "(A) 01/31/2012\n(B) 12/31/2011",
        "01/31/2012, 12/31/2011: A 01/31/2012 B 12/31/2011",
        "(B)",
    ),
    (
        "geometric_shapes",
        'This SVG path element <path d="M 43.79,3.46 L 66.68,10.86 M 66.68,10.86 L 56.02,58.65 L 43.79,3.46"/> draws a'
        "\nOptions:\n(A) circle\n(B) triangle",
        "66 1 56 2 43 3, triangle",
        "(B)",
    ),
    (
        "geometric_shapes",
        'This SVG path element <path d="M 60.00,33.00 L 55.42,43.00 A 11.00,11.00 0.00 0,1 52.81,24.68 L 60.00,33.00"/>'
        " draws a\nOptions:\n(A) sector\n(B) ellipse",
        "55 1 52 arc 60 2, sector",
        "(A)",
    ),
    ("penguins_in_a_table",
     _penguins("How many penguins are more than 7 years old and weight more than 12 kg?", COUNTS),
     "Louis 7 11 0, Bernard 5 13 0, Vincent 9 11 0, Gwen 8 15 1, James 12 12 1: 1", "(A)"),
    ("penguins_in_a_table", _penguins("Which is the second youngest penguin?", NAMES),
     "Louis 7 Bernard 5 Vincent 9 Gwen 8 James 12, 7: Louis", "(A)"),
    ("penguins_in_a_table", _penguins("What is the cumulated weight of the penguins?", ["49 kg", "62 kg"]),
     "Louis 11 11, Bernard 13 24, Vincent 11 35, Gwen 15 50, James 12 62: A 49 kg B 62 kg", "(B)"),
    ("penguins_in_a_table", _penguins("What is the average height of the penguins?", ["50", "70"]),
     "Louis 50 50, Bernard 80 130, Vincent 60 190, Gwen 70 260, James 90 350, 350/5: A 50 B 70", "(B)"),
    ("penguins_in_a_table", _penguins("What is the name of the fist penguin sorted by alphabetic order?", NAMES),
     "Bernard Gwen James Louis Vincent: Bernard", "(B)"),
    ("penguins_in_a_table", _penguins("What is the name of the last penguin?", NAMES),
     "Louis Bernard Vincent Gwen James: James", "(E)"),
    ("penguins_in_a_table", _penguins("What is the name of the 60 cm tall penguin?", NAMES),
     "Louis 50 Bernard 80 Vincent 60 Gwen 70 James 90, 60: Vincent", "(C)"),
    ("penguins_in_a_table", _penguins("How many animals are listed in the table?", COUNTS),
     "Louis 1 Bernard 2 Vincent 3 Gwen 4 James 5: 5", "(E)"),
    ("penguins_in_a_table", _penguins("What is the weight of Gwen?", ["15 kg", "11 kg"]), "Gwen 15: A 15 kg", "(A)"),
    ("penguins_in_a_table", _penguins("Which penguin is younger than Vincent and older than Louis?", NAMES),
     "Louis 7 Bernard 5 Vincent 9 Gwen 8 James 12, 8: Gwen", "(D)"),
    ("penguins_in_a_table", _penguins("Which penguin is two years younger than Vincent?", NAMES),
     "Louis 7 Bernard 5 Vincent 9 Gwen 8 James 12, 7: Louis", "(A)"),
]  # fmt: skip


@pytest.mark.parametrize(("task_id", "text", "working", "answer"), KNOWN)
def test_solves_known_inputs(task_id: str, text: str, working: str, answer: str) -> None:
    assert BBH_TASKS[task_id].solve(text) == (working, answer)


@given(task_id=st.sampled_from(sorted(BBH_TASKS)), text=st.text(max_size=80))
def test_unreadable_inputs_raise_unsolved(task_id: str, text: str) -> None:
    with pytest.raises(UnsolvedError):
        BBH_TASKS[task_id].solve(text)


@given(task_id=some_task, seed=st.integers(0, 2**32))
def test_generated_inputs_are_solved_and_trainable(task_id: str, seed: int) -> None:
    (example,) = SUITE.examples(task_id, "train", 1, seed)
    assert split_of(task_id, example.input) == "train"
    spec = bbh_spec(BBH_TASKS[task_id])
    # Marker and stop string separate the right parts.
    text = spec.worked_answer(example.working, example.target)
    assert spec.final_answer(text) == example.target
    assert "\n" not in text
    if "\nOptions:\n(" in example.input:
        assert example.target.strip("()") in read_options(example.input).values()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_boolean_answers_equal_pythons(seed: int) -> None:
    rng = random.Random(seed)
    for task_id, ending in (("boolean_expressions", " is"), ("multistep_arithmetic_two", " =")):
        task = BBH_TASKS[task_id]
        assert task.generate is not None
        text = task.generate(rng)
        assert str(eval(text.removesuffix(ending))) == task.solve(text).answer


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_orders_equal_a_search_over_permutations(seed: int) -> None:
    """Tries every permutation against the working's clues: one fits, and it is the one in the working."""
    for word in ("three", "five"):
        (example,) = SUITE.examples(f"logical_deduction_{word}_objects", "train", 1, seed)
        notes, rest, read = (example.working or "").split(": ")
        order, _, asked = rest.rpartition(", ")
        assert read.endswith(f"{example.target[1]} {asked}")
        assert asked in order
        listed = re.search(r" \w+: (.*?)\. ", example.input)
        assert listed
        things = [re.sub(r"^(and )?(an? )?", "", thing) for thing in re.split(r", | and ", listed[1]) if thing]
        fits = []
        for guess in permutations(sorted(things)):
            place = {thing: i for i, thing in enumerate(guess)}
            if all(
                place[note.split("<")[0]] < place[note.split("<")[1]]
                if "<" in note
                else place[note.split("=")[0]] == int(note.split("=")[1]) - 1
                for note in notes.split(", ")
            ):
                fits.append(" ".join(guess))
        assert fits == [order]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_tracking_equals_following_swaps_backwards(seed: int) -> None:
    """Follows the swaps back from the person asked for to who held the thing first."""
    for word in ("three", "five", "seven"):
        (example,) = SUITE.examples(f"tracking_shuffled_objects_{word}_objects", "train", 1, seed)
        holder = re.search(r"At the end of the \w+, (\w+)", example.input)[1]  # type: ignore[index]
        for one, other in reversed(re.findall(r"(?:First|Then|Finally), (\w+) and (\w+)", example.input)):
            holder = other if holder == one else one if holder == other else holder
        assert example.target == f"({holder[0]})"


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40)
def test_generated_dates_match_their_options(seed: int) -> None:
    (example,) = SUITE.examples("date_understanding", "train", 1, seed)
    days, _, read = (example.working or "").partition(": ")
    today, asked = days.split(", ")
    assert read.endswith(f"{example.target[1]} {asked}")
    assert example.target == f"({read_options(example.input)[asked]})"
    if "What is the date one week ago" in example.input:
        gap = datetime.datetime.strptime(today, "%m/%d/%Y") - datetime.datetime.strptime(asked, "%m/%d/%Y")
        assert gap.days == 7


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_shapes_equal_a_count_of_corners(seed: int) -> None:
    """From the path's points alone: a polygon has one per corner; other shapes have arcs."""
    (example,) = SUITE.examples("geometric_shapes", "train", 1, seed)
    (shape,) = [text for text, letter in read_options(example.input).items() if example.target == f"({letter})"]
    path = re.search(r'd="(.*)"', example.input)[1]  # type: ignore[index]
    corners = len(set(re.findall(r"[ML] (\S+)", path)))
    named = {
        "line": 2, "triangle": 3, "kite": 4, "trapezoid": 4, "pentagon": 5, "hexagon": 6, "heptagon": 7, "octagon": 8,
    }  # fmt: skip
    if "A" in path:
        assert shape == ("sector" if "L" in path else "ellipse")
    else:
        assert named[shape] == corners


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_penguins_equal_counts_from_the_text(seed: int) -> None:
    (example,) = SUITE.examples("penguins_in_a_table", "train", 1, seed)
    (found,) = [text for text, letter in read_options(example.input).items() if example.target == f"({letter})"]
    table, giraffes = (example.input.partition("listing giraffes")[i] for i in (0, 2))
    rows = {
        kind: [
            (name, *map(int, figures))
            for name, *figures in re.findall(r"([A-Z]\w+), (\d+), (\d+), (\d+)", text)
            if f"penguin named {name}" not in table
        ]
        for kind, text in (("penguin", table), ("giraffe", giraffes))
    }
    question = example.input.partition("\nOptions")[0]
    if asked := re.search(r"How many (\w+)s are (more|less) than (\d+) years old\?", question):
        kinds = rows[asked[1]] if asked[1] in rows else [*rows["penguin"], *rows["giraffe"]]
        sign = 1 if asked[2] == "more" else -1
        assert int(found) == sum(sign * row[1] > sign * int(asked[3]) for row in kinds)
    elif asked := re.search(r"cumulated (age|weight) of the (penguin|giraffe)s", question):
        assert int(found.split()[0]) == sum(row[1 if asked[1] == "age" else 3] for row in rows[asked[2]])


@pytest.mark.slow
@pytest.mark.parametrize("task_id", [task.id for task in SUITE.tasks])
def test_no_answer_dominates(task_id: str) -> None:
    answers = Counter(example.target for example in SUITE.examples(task_id, "train", 200))
    assert max(answers.values()) <= 0.6 * answers.total()


def test_a_seed_is_deterministic_and_splits_are_disjoint() -> None:
    for task in SUITE.tasks:
        few, more = SUITE.examples(task.id, "train", 3, 5), SUITE.examples(task.id, "train", 6, 5)
        assert more[:3] == few
        assert SUITE.examples(task.id, "train", 6, 6) != more
        assert {split_of(task.id, e.input) for e in SUITE.examples(task.id, "test", 3)} == {"test"}
        assert task.answer_marker == ANSWER_MARKER


def test_working_is_given_only_if_the_solver_agrees() -> None:
    (example,) = SUITE.examples("navigate", "train", 1)
    assert with_working(type(example)("navigate", example.input, example.target)).working == example.working
    wrong = "No" if example.target == "Yes" else "Yes"
    assert with_working(type(example)("navigate", example.input, wrong)).working is None
    assert with_working(type(example)("snarks", "x", "(A)")).working is None


def test_refuses_wrong_requests() -> None:
    with pytest.raises(SuiteError, match="no task 'snarks'; it has boolean_expressions"):
        SUITE.examples("snarks", "train", 1)
    with pytest.raises(SuiteError, match="count of task navigate is None"):
        SUITE.examples("navigate", "train", None)
