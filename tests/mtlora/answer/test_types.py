"""Types of answers: allowed texts, their values, refused types, and limits on time."""

import calendar
import json
import random
import re
import time
from datetime import date
from decimal import Decimal
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtlora.answer import AnswerError, Date, Grammar, Json, Label, Number, Regex, Text
from mtlora.answer.constraint import Constraint, checked, read
from mtlora.answer.language import LAST, Automaton, chars

_PATTERNS = (
    r"[a-z]{1,3}(-\d+)?", r"^(Yes|No)$", r"\w+@\w+\.(com|org)", r"[^\n]{0,5}", r"a*?b", r"(?:x|yy)+", r".é?", r"\S\s\D",
)  # fmt: skip


@pytest.mark.parametrize("pattern", _PATTERNS)
@given(text=st.text(alphabet="abxyz-09@.\nYesNoé com", max_size=8))
def test_a_regex_allows_what_it_matches_as_a_whole(pattern: str, text: str) -> None:
    allowed = Regex(pattern=pattern).automaton.matches(text)
    assert allowed == bool(re.fullmatch(pattern, text, re.ASCII))


@given(st.lists(st.tuples(st.integers(0, LAST), st.integers(0, LAST)), min_size=1, max_size=3), st.characters())
def test_a_class_reads_the_bytes_of_its_characters_alone(bounds: list[tuple[int, int]], char: str) -> None:
    ranges = [(min(pair), max(pair)) for pair in bounds]
    try:
        automaton = Automaton(chars(ranges))
    except AnswerError:
        assert all(low >= 0xD800 and high <= 0xDFFF for low, high in ranges)
        return
    assert automaton.matches(char) == any(low <= ord(char) <= high for low, high in ranges)


@given(st.data())
def test_a_number_is_a_multiple_of_its_step_in_its_range(data: st.DataObject) -> None:
    places = data.draw(st.integers(0, 3))
    step = Decimal(1).scaleb(-places)
    low, high = sorted(data.draw(st.lists(st.integers(-3000, 3000), min_size=2, max_size=2)))
    minimum, maximum = low * step, high * step
    answer = Number(minimum=minimum, maximum=maximum, step=step)
    inside = data.draw(st.integers(low, high)) * step
    assert answer.value(f"{inside + 0:f}" if inside else "0") == inside
    other = data.draw(st.decimals(-4000, 4000, places=4))
    text = f"{other:f}"
    if not minimum <= other <= maximum or other % step:
        assert not answer.check(text)


def test_number_takes_any_step() -> None:
    quarters = Number(minimum=Decimal(0), maximum=Decimal(1), step=Decimal("0.25"))
    assert [text for text in ("0", "0.25", "0.3", "0.5", "0.75", "1", "1.25") if quarters.check(text)] == [
        "0", "0.25", "0.5", "0.75", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["%Y-%m-%d", "%m/%d/%Y", "%d.%m.%Y", "on %d-%m, %Y"])
@given(st.integers(0, 9999), st.integers(0, 13), st.integers(0, 32))
def test_a_date_is_one_of_the_calendar(format: str, year: int, month: int, day: int) -> None:
    answer = Date(format=format)
    text = format.replace("%Y", f"{year:04}").replace("%m", f"{month:02}").replace("%d", f"{day:02}")
    exists = year > 0 and 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1]
    assert answer.check(text) == exists
    if exists:
        assert answer.value(text) == date(year, month, day)


_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["a", 2, None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 2},
        "size": {"type": ["integer", "null"], "minimum": 0, "maximum": 50},
    },
    "required": ["kind"],
    "$defs": {"tag": {"type": "string", "pattern": "^[a-z]+$"}},
}
_AGAIN = {"$ref": "#/$defs/a"}
_VALUES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["a", 2, None])},
    optional={
        "name": st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=8),
        "tags": st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=2),
        "size": st.one_of(st.none(), st.integers(0, 50)),
    },
)


@given(_VALUES)
def test_json_allows_what_its_schema_does(value: dict[str, Any]) -> None:
    answer = Json.model_validate({"schema": _SCHEMA})
    in_order = {name: value[name] for name in _SCHEMA["properties"] if name in value}
    for separators in ((",", ":"), (", ", ": ")):
        text = json.dumps(in_order, ensure_ascii=False, separators=separators)
        assert answer.value(text) == value
    for wrong in ({**in_order, "more": 1}, {**in_order, "size": 51}, {**in_order, "kind": "b"}, {"name": "x"}):
        assert not answer.check(json.dumps(wrong))


_STRINGS = st.sampled_from(["", "a", "b/c", "é", '"\\'])
_PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, -2.0]), _STRINGS)
_KINDS = st.sampled_from(["string", "integer", "number", "boolean", "null"])
_LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"type": st.one_of(_KINDS, st.lists(_KINDS, min_size=1, max_size=3, unique=True))}),
    st.fixed_dictionaries({"enum": st.lists(_PLAIN, min_size=1, max_size=4)}, optional={"type": _KINDS}),
    st.fixed_dictionaries({"const": _PLAIN}, optional={"type": _KINDS}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={"minimum": st.integers(-5, 5), "exclusiveMaximum": st.integers(-5, 9)},
    ),
    st.fixed_dictionaries({"type": st.just("string")}, optional={"maxLength": st.integers(0, 3)}),
    st.just({"type": "object"}),
    st.just({"$ref": "#/$defs/some"}),
)
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 3)}),
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("pqr"), inner, max_size=3)},
            optional={"required": st.just(["p"]), "additionalProperties": st.booleans()},
        ),
        st.builds(
            lambda word, options: {word: options}, st.sampled_from(["anyOf", "oneOf"]), st.lists(inner, min_size=1)
        ),
    ),
    max_leaves=6,
)


@given(_SCHEMAS, st.randoms(use_true_random=False))
def test_what_a_schema_lets_through_is_valid(schema: dict[str, Any], rng: random.Random) -> None:
    """Compared with another implementation: a schema is refused, or every answer is one of its instances."""
    schema = {**schema, "$defs": {"some": {"enum": ["x", 7]}}}
    try:
        automaton = Json.model_validate({"schema": schema}).automaton
    except (AnswerError, ValidationError):
        return
    bytes_left, way = automaton.ways_out()
    for _ in range(5):
        text, states = bytearray(), automaton.start
        for _ in range(rng.randrange(40)):
            if not (edges := [edge for state in sorted(states) for edge in automaton.edges[state]]):
                break
            low, high, _target = rng.choice(edges)
            text.append(rng.randint(low, high))
            states = automaton.step(states, text[-1])
        state = min(states, key=bytes_left.__getitem__)
        while step := way[state]:
            text.append(step[0])
            state = step[1]
        jsonschema.validate(json.loads(text.decode()), schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"type": "integer", "enum": ["a"]}', "no value is of type integer"),
        ('{"type": "string", "const": 5}', "no value is of type string"),
        ('{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "oneOf"),
        ('{"oneOf": [{"enum": [1, 2]}, {"const": 1.0}]}', "oneOf"),
        ('{"const": 1e999}', "numbers that a double holds"),
        ('{"type": "object"}', "needs properties"),
        ('{"type": "object", "properties": {}, "additionalProperties": true}', "additionalProperties"),
    ],
)
def test_refuses_schemas_whose_answers_would_be_invalid(schema: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Json.model_validate({"schema": schema})


def test_lone_surrogates_are_refused() -> None:
    """No token sequence can produce them."""
    for data in ({"type": "json", "schema": '{"const": "\\ud800"}'}, {"type": "label", "labels": ["\ud800", "b"]}):
        with pytest.raises(AnswerError, match="surrogate"):
            list(checked(data, None, (), 1000))


def test_enums_keep_the_values_of_their_type() -> None:
    answer = Json.model_validate({"schema": {"type": ["string", "null"], "enum": ["a", None, 1]}})
    assert [text for text in ('"a"', "null", "1") if answer.check(text)] == ['"a"', "null"]


def test_a_grammar_accepts_what_its_rules_derive() -> None:
    answer = Grammar(
        rules='root ::= amount " " ("EUR" | "USD")  # an amount\namount ::= [1-9] [0-9]{0,5} ("." [0-9] [0-9])?'
    )
    assert answer.check("1200.00 EUR")
    assert answer.check("7 USD")
    assert not answer.check("1200.0 EUR")
    assert not answer.check("1200.00EUR")


def test_text_is_one_line() -> None:
    assert Text().check("a => b é")
    assert not Text().check("")
    assert not Text().check("a\nb")
    assert Text(max_length=3).check("abc")
    assert not Text(max_length=3).check("abcd")


def test_what_many_places_refer_to_is_read_once() -> None:
    defs: dict[str, Any] = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 30} for i in range(7)}
    began = time.monotonic()
    answer = Json.model_validate({"schema": {"$ref": "#/$defs/d0", "$defs": {**defs, "d7": {"type": "integer"}}}})
    assert answer.check("7")
    # 30^7 reads take hours.
    assert time.monotonic() - began < 2


def test_refuses_a_short_grammar_that_is_long_when_written_out() -> None:
    rules = [f'r{i} ::= "x" r{i + 1} | "y" r{i + 1}' for i in range(40)]
    began = time.monotonic()
    answer = Grammar(rules="\n".join(["root ::= r0", *rules, 'r40 ::= "a"']))
    assert answer.automaton.size < 200
    with pytest.raises(AnswerError, match="written out"):
        Constraint(answer).compile()
    assert time.monotonic() - began < 2


# Few rules, and a sequence of 2^40 parts.
_DOUBLING = "\n".join([*(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40)), 'r40 ::= "a"'])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"type": "json", "schema": "no JSON"}, "not JSON"),
        ({"type": "json", "schema": "[" * 50_000}, "not JSON"),
        ({"type": "json", "schema": {"type": "objct"}}, "found 'objct'"),
        ({"type": "json", "schema": {"type": "array"}}, "needs items"),
        ({"type": "json", "schema": {"type": "object", "patternProperties": {}}}, "'patternProperties'"),
        ({"type": "json", "schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum 5, maximum 3"),
        ({"type": "json", "schema": {"type": "string", "pattern": "^.*$"}}, "may match"),
        (
            {"type": "json", "schema": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": _AGAIN}}}},
            "recurses",
        ),
        ({"type": "regex", "pattern": "(a"}, "unterminated"),
        ({"type": "regex", "pattern": "(?=a)a"}, "takes no assert"),
        ({"type": "regex", "pattern": r"(a)\1"}, "takes no groupref"),
        ({"type": "regex", "pattern": "a{20000}"}, "20000 repeats"),
        ({"type": "regex", "pattern": "(" * 300 + "a" + ")" * 300}, "nested deeper"),
        ({"type": "regex", "pattern": "a" * 10_001}, "10001 characters"),
        ({"type": "grammar", "rules": 'root ::= "x" root?'}, "recurses: root -> root"),
        ({"type": "grammar", "rules": 'a ::= b\nb ::= c | "x"\nc ::= a'}, "recurses: a -> b -> c -> a"),
        ({"type": "grammar", "rules": _DOUBLING}, "takes more than 30000 states"),
        ({"type": "grammar", "rules": "root ::= other"}, "no rule other"),
        ({"type": "grammar", "rules": 'root ::= ("x"'}, "not closed"),
        ({"type": "grammar", "rules": '"x"'}, "begins without a rule"),
        ({"type": "grammar", "rules": "root ::= @"}, "cannot be read"),
        ({"type": "label", "labels": ["a"]}, "2 to 1000"),
        ({"type": "label", "labels": ["a", "a"]}, "distinct"),
        ({"type": "label", "labels": ["a", " b"]}, "begins or ends with a blank"),
        ({"type": "label", "labels": [str(i) for i in range(100_000)]}, "100000 labels"),
        ({"type": "number", "minimum": 2, "maximum": 1}, "minimum 2, maximum 1"),
        ({"type": "number", "step": 7}, "allowed: 10000"),
        ({"type": "number", "step": "NaN"}, "finite"),
        ({"type": "date", "format": "%Y-%B-%d"}, "allowed: %Y, %m and %d"),
    ],
)  # fmt: skip
def test_refuses_types_that_cannot_be_used(data: dict[str, Any], reason: str) -> None:
    from mtlora.task import TaskSpec

    with pytest.raises(ValidationError, match=re.escape(reason)):
        TaskSpec.model_validate({"id": "t", "description": "d", "answer": data})


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "((a{100}){100}){100}", "[ab]{9999}" * 9])
def test_refuses_a_regex_that_explodes_without_building_it(pattern: str) -> None:
    began = time.process_time()
    with pytest.raises(AnswerError):
        Constraint(Regex(pattern=pattern)).compile()
    # What is built stays below a limit: seconds on any machine, where the whole would take hours.
    assert time.process_time() - began < 20


def test_a_type_that_may_contain_a_stop_string_is_refused() -> None:
    with pytest.raises(AnswerError, match=r"may contain the stop string '\\n'"):
        Constraint(Regex(pattern=r"[a\n]+"), None, ("\n",)).compile()


@given(
    st.sampled_from(
        [
            Label(labels=("a", "b")),
            Date(),
            Text(),
            Json.model_validate({"schema": _SCHEMA}),
            Number(step=Decimal("0.1")),
        ]
    )
)
def test_a_constraint_survives_its_text(answer: Any) -> None:
    constraint = Constraint(answer, "=>", ("\n", "é"))
    assert read(constraint.text) == constraint


@given(st.text(max_size=60))
def test_any_text_is_a_type_or_refused(text: str) -> None:
    for kind, name in (("regex", "pattern"), ("grammar", "rules"), ("json", "schema"), ("date", "format")):
        models: dict[str, Any] = {"regex": Regex, "grammar": Grammar, "json": Json, "date": Date}
        try:
            found = models[kind].model_validate({"type": kind, name: text})
            Constraint(found).compile(2000)
        except (ValidationError, AnswerError):
            continue
