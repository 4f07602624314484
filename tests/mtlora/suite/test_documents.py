"""The suite of documents: exact answers, disjoint documents, no dominant answer, typed targets, lengths."""

import datetime
import hashlib
import itertools
import random
import re
from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from mtlora.suite import SPLITS, DocumentsSuite, SuiteError, load_suite
from mtlora.suite.builtin.words import MONTHS
from mtlora.suite.documents.facts import KINDS, Facts
from mtlora.suite.documents.writing import amount_text, date_text
from mtlora.task import DOCUMENT, TaskSpec

SUITE = DocumentsSuite()
TRAIN = SUITE.documents("train", 600)
PINNED = "b494a15a16d96b2c8b962558e3da8c5c9486d8914d90d4a3dfdbf5692b37d164"
each_task = pytest.mark.parametrize("spec", SUITE.tasks, ids=lambda spec: spec.id)


def test_at_least_25_tasks_share_their_documents() -> None:
    assert len({spec.id for spec in SUITE.tasks}) == len(SUITE.tasks) == 32
    assert len({spec.document_template for spec in SUITE.tasks}) == 1
    assert all(spec.fields == (DOCUMENT,) for spec in SUITE.tasks)
    assert load_suite("documents").tasks == SUITE.tasks
    texts = [text for text, _ in TRAIN[:50]]
    for spec in SUITE.tasks:
        assert [example.input for example in SUITE.examples(spec.id, "train", 50)] == texts
        assert TaskSpec.model_validate_json(spec.model_dump_json()) == spec


def test_splits_share_no_document() -> None:
    texts = {split: {text for text, _ in SUITE.documents(split, 100, seed=1)} for split in SPLITS}
    assert all(len(found) == 100 for found in texts.values())
    for one, other in itertools.combinations(SPLITS, 2):
        assert not texts[one] & texts[other]


@each_task
def test_every_target_has_its_tasks_type(spec: TaskSpec) -> None:
    assert spec.answer is not None
    for split in SPLITS:
        for example in SUITE.examples(spec.id, split, 100, seed=1):
            assert spec.answer.check(example.target), example.target
            assert example.target == example.target.strip()


@each_task
def test_no_answer_dominates(spec: TaskSpec) -> None:
    targets = Counter(example.target for example in SUITE.examples(spec.id, "train", 600))
    if spec.labels:
        assert set(targets) == set(spec.labels)
    assert targets.most_common(1)[0][1] / 600 <= {2: 0.65, 3: 0.5}.get(len(targets), 0.45)


def _dates(text: str) -> set[datetime.date]:
    """Every date in a text, read independently of how it was written."""
    month = "|".join({name[:3] for name in MONTHS})
    found = set()
    for y, m, d in re.findall(r"\b(\d{4})-(\d\d)-(\d\d)\b", text):
        found.add(datetime.date(int(y), int(m), int(d)))
    for d, m, y in re.findall(r"\b(\d\d)\.(\d\d)\.(\d{4})\b", text):
        found.add(datetime.date(int(y), int(m), int(d)))
    for d, name, y in re.findall(rf"\b(\d\d?) ({month})[a-z]* (\d{{4}})\b", text):
        found.add(datetime.datetime.strptime(f"{d} {name} {y}", "%d %b %Y").date())
    for name, d, y in re.findall(rf"\b({month})[a-z]* (\d\d?), (\d{{4}})\b", text):
        found.add(datetime.datetime.strptime(f"{d} {name} {y}", "%d %b %Y").date())
    return found


def _sums(text: str) -> set[Decimal]:
    return {Decimal(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.\d\d\b", text)}


def test_documents_say_their_facts_and_nothing_that_contradicts_them() -> None:
    """An independent reader finds every value in the text exactly once in its form."""
    kinds = Counter()
    for text, facts in TRAIN:
        kinds[facts.kind] += 1
        dates = {facts.date, *([facts.due] if facts.due else [])}
        assert dates <= _dates(text) <= dates | set(facts.other_dates)
        assert facts.sender in text and facts.recipient in text and all(name in text for name in facts.people)  # noqa: PT018
        assert not set(facts.other_people) & {facts.sender, facts.recipient, *facts.people}
        assert set(re.findall(r"\S+@\S+[a-z]", text)) == ({facts.email} if facts.email else set())
        assert set(re.findall(r"555-\d{4}", text)) == ({facts.phone} if facts.phone else set())
        assert [r for r in re.findall(r"\b[A-Z]{2}-\d{4}", text) if not r.startswith("Z")] == [facts.reference]
        assert set(re.findall(r"cost centre (?:is )?(\d+)", text)) == (
            {facts.cost_centre} if facts.cost_centre else set()
        )
        assert len(re.findall(r"^(?:[-*] .*(?: at |: )\d.*|.* \| \d+ \| .*)$", text, re.MULTILINE)) >= len(facts.items)
        if facts.total is not None:
            assert facts.total in _sums(text)
        assert all(item.price in _sums(text) for item in facts.items)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 60


def test_the_questions_of_a_missing_fact_say_none() -> None:
    def target(task_id: str, facts: Facts) -> str:
        return next(question.answer(facts) for question in SUITE._questions.values() if question.spec.id == task_id)

    missing = next(facts for _, facts in TRAIN if facts.total is None and facts.due is None)
    for task_id in ("total_amount", "currency", "above_thousand", "due_date"):
        assert target(task_id, missing) == "none"
    assert target("has_deadline", missing) == "no"
    assert target("payment_json", missing) == '{"total": "none", "due": "none"}'
    given = next(facts for _, facts in TRAIN if facts.total is not None and facts.due is not None)
    assert target("total_amount", given) == f"{given.total:.2f}"
    assert target("due_date", given) == given.due.isoformat()


def test_dates_and_amounts_are_written_in_several_ways() -> None:
    rng = random.Random(0)
    date = datetime.date(2024, 3, 5)
    texts = {date_text(date, rng) for _ in range(60)}
    assert texts == {"2024-03-05", "5 March 2024", "March 5, 2024", "5 Mar 2024", "05.03.2024"}
    assert all(_dates(text) == {date} for text in texts)
    amounts = {amount_text(Decimal("1234.50"), "EUR", rng) for _ in range(60)}
    assert amounts == {f"{f.format(n)}" for n in ("1234.50", "1,234.50") for f in ("{} EUR", "EUR {}", "€{}")}


@pytest.mark.slow
def test_documents_have_200_to_1500_tokens(tokenizer: Any) -> None:
    lengths = sorted(len(ids.ids) for ids in tokenizer.encode_batch([text for text, _ in TRAIN]))
    assert lengths[0] >= 200
    assert lengths[-1] <= 1500
    assert lengths[60] < 400
    assert lengths[-60] > 1000
    for spec in SUITE.tasks:
        longest = max(len(tokenizer.encode(f" {e.target}").ids) for e in SUITE.examples(spec.id, "train", 100))
        assert longest + 2 <= spec.max_new_tokens, spec.id
        assert len(tokenizer.encode(spec.template).ids) <= 60


def test_documents_are_pinned_and_follow_the_seed() -> None:
    digest, suite = hashlib.sha256(), DocumentsSuite()
    for spec, split in itertools.product(SUITE.tasks, SPLITS):
        for example in suite.examples(spec.id, split, 5, seed=7):
            digest.update(f"{example.task_id}\0{example.input}\0{example.target}\0".encode())
    assert digest.hexdigest() == PINNED
    assert SUITE.documents("test", 5, 1) != SUITE.documents("test", 5, 2)
    assert DocumentsSuite().documents("test", 9)[:4] == DocumentsSuite().documents("test", 4)


def test_refuses_an_unknown_task_split_or_count() -> None:
    with pytest.raises(SuiteError, match="no task 'nonesuch'; it has document_kind, "):
        SUITE.examples("nonesuch", "train", 1)
    with pytest.raises(SuiteError, match="no split 'dev'; there are train, validation, test"):
        SUITE.examples("city", "dev", 1)  # type: ignore[arg-type]
    with pytest.raises(SuiteError, match="count of task city is None"):
        SUITE.examples("city", "train", None)
