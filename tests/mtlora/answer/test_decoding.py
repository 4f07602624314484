"""A decoder constrained to a type: any sampled text is of the type and ends in time."""

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtlora.answer import AnswerType, Date, Grammar, Json, Label, Number, Regex, Text
from mtlora.answer.constraint import Constraint, next_token
from tests.mtlora.answer.sampling import allowed_tokens, sample

pytest.importorskip("llguidance")
typed = pytest.importorskip("mtlora.vllm_plugin.typed")
closing = pytest.importorskip("mtlora.vllm_plugin.closing")

_PIECES = (
    "=>", " =>", "= ", "=", ">", "\n", " \n", "Yes", " Yes", "No", " No", "ref", "und", " refund", "delivery", "20",
    "12", "0", "1", '{"', '":', '", "', '"}', "true", " false", "abc", " abc", "é", "日本", "a" * 40, "EUR", " EUR",
    "=>x",
)  # fmt: skip
_END = "<end>"
_TYPES: dict[str, AnswerType] = {
    "label": Label(labels=("refund", "delivery", "ref", "Yes", "No")),
    "number": Number(minimum=-99, maximum=9999),
    "date": Date(format="%m/%d/%Y"),
    "regex": Regex(pattern="[a-z]{1,9}( [a-z]{1,9}){0,3}"),
    "text": Text(),
    "json": Json.model_validate(
        {
            "schema": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "ok": {"type": "boolean"},
                    "more": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["name", "ok"],
            }
        }
    ),
    "grammar": Grammar(rules='root ::= [0-9]{1,6} ("." [0-9]{2})? " " ("EUR"|"日本")'),
}


@cache
def _tokenizer(kind: str) -> Any:
    """Byte-level, or with a fallback to bytes behind words; both small."""
    if kind == "byte-level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        names = [_END, *alphabet]
        for piece in _PIECES:
            ((text, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)
            names += [] if text in names else [text]
        made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        names = [_END, *(f"<0x{byte:02X}>" for byte in range(256))]
        names += [each for each in dict.fromkeys(p.replace(" ", "▁") for p in _PIECES) if each not in names]
        made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([_END])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=_END)


@cache
def _outputs(kind: str) -> Any:
    return typed.TypedOutputs(_tokenizer(kind), len(_tokenizer(kind)) + 5)


def _sample(kind: str, constraint: Constraint, left: int, rng: random.Random) -> str:
    # Working may hold any bytes.
    return sample(_outputs(kind), constraint.text, left, rng, ends=0.1).decode(errors="replace")


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("name", _TYPES)
@settings(max_examples=25)
@given(st.booleans(), st.sampled_from([0, 1, 2, 5, 20, 80]), st.integers(0, 1 << 32))
def test_no_answer_lies_outside_or_is_cut(kind: str, name: str, worked: bool, spare: int, seed: int) -> None:
    answer = _TYPES[name]
    constraint = Constraint(answer, "=>" if worked else None, ("\n",))
    left = _outputs(kind).compiled(constraint.text).fewest_with_marker + spare
    text = _sample(kind, constraint, left, random.Random(seed))
    _working, found, rest = text.partition("=>")
    assert "\n" not in text
    assert answer.check(rest if worked and found else text), text


def test_too_few_tokens_are_refused() -> None:
    outputs = _outputs("byte-level")
    constraint = Constraint(_TYPES["date"], "=>", ("\n",))
    fewest = outputs.compiled(constraint.text).fewest_with_marker
    with pytest.raises(ValueError, match=f"takes {fewest} tokens at least"):
        outputs.grammar(constraint.text, fewest - 1, None)


def test_working_stays_free_but_for_its_end() -> None:
    outputs = _outputs("byte-level")
    vocabulary = outputs.vocabulary
    grammar = outputs.grammar(Constraint(_TYPES["label"], "=>", ("\n",)).text, 50, None)
    shut_out = set(range(len(vocabulary.texts))) - set(allowed_tokens(outputs, grammar))
    # Special and unknown tokens, stop strings, and what goes on after a marker within its token.
    assert {vocabulary.texts[token] for token in shut_out} == {b"", b"\n", b" \n", b"=>x"}
    for text in (b"ref", b"und"):
        grammar.accept_tokens("x", [vocabulary.ids[text]])
    # An answer without working may end.
    assert vocabulary.eos in allowed_tokens(outputs, grammar)


def test_a_marker_in_two_tokens_begins_the_answer() -> None:
    outputs = _outputs("byte-level")
    ids = outputs.vocabulary.ids
    grammar = outputs.grammar(Constraint(_TYPES["label"], "=>", ("\n",)).text, 50, None)
    assert grammar.accept_tokens("x", [ids[b"abc"], ids[b"="], ids[b">"]])
    begins = {bytes(outputs.vocabulary.texts[token][:2]) for token in allowed_tokens(outputs, grammar)}
    assert begins <= {b" ", b" Y", b" N", b" r", b"Y", b"Ye", b"N", b"No", b"r", b"re", b"d", b"de"}


def test_rolling_back_and_validating_leave_no_trace() -> None:
    outputs = _outputs("byte-level")
    ids = outputs.vocabulary.ids
    grammar = outputs.grammar(Constraint(_TYPES["label"], None, ("\n",)).text, 20, None)
    before = list(allowed_tokens(outputs, grammar))
    assert grammar.validate_tokens([ids[b"ref"], ids[b"und"], ids[b"Yes"]]) == [ids[b"ref"], ids[b"und"]]
    assert list(allowed_tokens(outputs, grammar)) == before
    assert grammar.accept_tokens("x", [ids[b"ref"]])
    assert not grammar.accept_tokens("x", [ids[b"Yes"]])
    grammar.rollback(1)
    assert list(allowed_tokens(outputs, grammar)) == before


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("worked", [False, True])
@settings(max_examples=30)
@given(st.sampled_from(sorted(_TYPES)), st.integers(0, 1 << 32))
def test_speculation_leaves_a_sequence_where_its_tokens_have_it(kind: str, worked: bool, name: str, seed: int) -> None:
    """Drafts that are accepted, validated and rolled back, past an end too, as vLLM's scheduler does it."""
    outputs, rng = _outputs(kind), random.Random(seed)
    # This grammar has its own cache of rows.
    plain = typed.TypedOutputs(_tokenizer(kind), len(_tokenizer(kind)) + 5)
    vocabulary = outputs.vocabulary
    text = Constraint(_TYPES[name], "=>" if worked else None, ("\n",)).text
    left = outputs.compiled(text).fewest_with_marker + 12

    def follow(tokens: list[int]) -> Any:
        grammar = plain.grammar(text, left, None)
        assert grammar.accept_tokens("x", tokens)
        return grammar

    def drafts(grammar: Any) -> Iterator[int]:
        while True:
            allowed = allowed_tokens(plain, grammar)
            likely = vocabulary.eos if vocabulary.eos in allowed and rng.random() < 0.4 else rng.choice(allowed)
            yield likely if rng.random() < 0.8 else rng.randrange(len(vocabulary.texts))

    grammar, accepted = outputs.grammar(text, left, None), []
    while not grammar.is_terminated() and len(accepted) < left - 1:
        ahead = follow(accepted)
        draft = []
        for token in itertools.islice(drafts(ahead), rng.randrange(5)):
            draft.append(token)
            if ahead.is_terminated() or not ahead.accept_tokens("x", [token]):
                break
        draft += [rng.randrange(len(vocabulary.texts)) for _ in range(rng.randrange(3))]
        valid = grammar.validate_tokens(draft)
        assert valid == draft[: len(valid)]
        assert follow(accepted + valid[:-1]).is_terminated() is False
        # Like vLLM when it fills the masks of a step.
        for token in valid:
            assert grammar.accept_tokens("x", [token])
        grammar.rollback(len(valid))
        assert list(allowed_tokens(outputs, grammar)) == list(allowed_tokens(plain, follow(accepted)))
        taken = valid[: rng.randint(0, len(valid))] or [rng.choice(allowed_tokens(outputs, grammar))]
        assert grammar.accept_tokens("x", taken)
        accepted += taken
        if not grammar.is_terminated():
            assert list(allowed_tokens(outputs, grammar)) == list(allowed_tokens(plain, follow(accepted)))


def test_next_token_allows_the_tokens_of_its_set_alone() -> None:
    outputs = _outputs("byte-level")
    grammar = outputs.grammar(next_token([3, 5]), 1, None)
    assert np.array_equal(allowed_tokens(outputs, grammar), [3, 5])


def test_memory_of_compiled_types_is_bounded_while_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type may lead to hundreds of states at every byte, each time to others."""
    outputs, rng = typed.TypedOutputs(_tokenizer("byte-level"), len(_tokenizer("byte-level")) + 5), random.Random(0)

    def used(number: int, times: int) -> Any:
        automaton = outputs.compiled(Constraint(Regex(pattern=f".*a.{{200}}{number}")).text).automaton
        for _ in range(times):
            automaton.read(automaton.start, "".join(rng.choices("ab", k=100)).encode())
            assert sum(map(len, automaton._steps.values())) <= 100_000
        return automaton

    built = outputs.compiled(Constraint(Regex(pattern=".*a.{200}0")).text).size
    monkeypatch.setattr(outputs, "_of_requests", typed._Kept(4 * built))
    grown = [used(number, 15) for number in (1, 2)]
    assert all(2 * built < outputs.compiled(Constraint(Regex(pattern=f".*a.{{200}}{n}")).text).size for n in (1, 2))
    last = used(3, 200)
    kept = [each.automaton for each in outputs._of_requests._all.values()]
    # Four of this size would fit, but two of them grow by their caches.
    assert all(a is b for a, b in zip(kept, [grown[1], last], strict=True))


def test_lexers_count_among_what_is_kept() -> None:
    outputs = typed.TypedOutputs(_tokenizer("byte-level"), len(_tokenizer("byte-level")) + 5)
    made = outputs.compiled(Constraint(Regex(pattern="[a-z]{3}")).text)
    assert made.size >= made.automaton.size + made.lexer.states // 2


def test_types_of_requests_cost_no_task_its_own() -> None:
    outputs = typed.TypedOutputs(_tokenizer("byte-level"), len(_tokenizer("byte-level")) + 5)
    outputs._of_requests = typed._Kept(1)
    task, request = (Constraint(Regex(pattern=f"a{name}")).text for name in "tr")
    made = outputs.compiled(task, of_task=True)
    for number in range(3):
        outputs.compiled(Constraint(Regex(pattern=f"b{number}")).text)
    assert outputs.compiled(task) is made
    # A request may have brought it first.
    own = outputs.compiled(request)
    assert outputs.compiled(request, of_task=True) is own
    outputs.compiled(Constraint(Regex(pattern="c")).text)
    assert outputs.compiled(request) is own


class _Steps(NamedTuple):
    """An automaton's steps, those that read nothing apart."""

    edges: list[list[tuple[int, int, int]]]
    empty: list[list[int]]


@given(st.data())
def test_worst_is_the_most_that_may_be_left_after_a_token(data: st.DataObject) -> None:
    states = data.draw(st.integers(1, 12))
    some = st.lists(st.integers(0, states - 1), max_size=3)
    edges = [[(1, 2, target) for target in data.draw(some)] for _ in range(states)]
    steps = _Steps(edges, [data.draw(some) for _ in range(states)])
    needs = data.draw(st.lists(st.integers(0, 30), min_size=states, max_size=states))

    def reached(froms: set[int]) -> set[int]:
        found = froms | {target for state in froms for target in steps.empty[state]}
        return found if found == froms else reached(found)

    for state, worst in enumerate(closing._worst(steps, needs)):
        found, at = [-1], {state}
        for _ in range(closing.LONGEST_TOKEN):
            at = {target for each in reached(at) for _, _, target in steps.edges[each]}
            found += [needs[each] for each in at]
        assert worst == max(found)
