"""The tasks: a question of a document, and its answer from the document's facts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from mtlora.answer import AnswerType, Date, Json, Label, Number, Regex
from mtlora.suite.documents.facts import CURRENCIES, KINDS, MATERIAL, Facts
from mtlora.task import TaskSpec

NONE: Final = "none"
_NAME = r"[A-Z][a-z]{1,12} [A-Z][a-z]{1,12}"
_DATE = r"\d{4}-\d\d-\d\d"
_AMOUNT = r"(0|[1-9]\d{0,5})\.\d\d"
_REFERENCE = r"[A-Z]{2}-\d{4}"
_EMAIL = r"[a-z]{2,12}(\.[a-z]{2,12})?@[a-z]{2,12}\.(com|net|org)"
_PRODUCTS = Label(labels=tuple(MATERIAL["products"]))
_TOPICS: Final = tuple(MATERIAL["topics"])
_TEAMS: Final = tuple(dict.fromkeys(topic["team"] for topic in MATERIAL["topics"].values()))
_YES_OR_NO = Label(labels=("yes", "no"))


@dataclass(frozen=True, slots=True)
class Question:
    """`answer` gives the exact target."""

    spec: TaskSpec
    answer: Callable[[Facts], str]


def _or_none(pattern: str) -> Regex:
    return Regex(pattern=f"{pattern}|{NONE}")


def _labels(*labels: str) -> Label:
    return Label(labels=labels)


def _object(**properties: object) -> Json:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return Json.model_validate({"type": "json", "schema": schema})


def _text(pattern: str) -> dict[str, str]:
    return {"type": "string", "pattern": f"^({pattern})$"}


def _question(
    task_id: str, text: str, answer_type: AnswerType, answer: Callable[[Facts], object], max_new_tokens: int = 16
) -> Question:
    def written(facts: Facts) -> str:
        found = answer(facts)
        if isinstance(found, bool):
            return "yes" if found else "no"
        return json.dumps(found) if isinstance(found, dict) else NONE if found is None else str(found)

    spec = TaskSpec(
        id=task_id, description=text, document_template="Document:\n{document}\n\n",
        template=f"Question: {text}\nAnswer:", max_new_tokens=max_new_tokens, answer=answer_type,
    )  # fmt: skip
    return Question(spec, written)


def _amount(facts: Facts) -> str | None:
    return None if facts.total is None else f"{facts.total:.2f}"


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# The order numbers the tasks of an adapter: append, never reorder.
QUESTIONS: Final[tuple[Question, ...]] = (
    _question("document_kind", f"Which kind of document is it: {_listed(KINDS)}?", Label(labels=KINDS),
              lambda f: f.kind),
    _question("document_sender", "Who wrote or issued the document?", Regex(pattern=_NAME), lambda f: f.sender),
    _question("document_recipient", "Who is the document for?", Regex(pattern=_NAME), lambda f: f.recipient),
    _question("document_date", "What is the date of the document, as YYYY-MM-DD?", Date(), lambda f: f.date),
    _question("document_month", "Which month is the document from, as a number from 1 to 12?",
              Number(minimum=1, maximum=12), lambda f: f.date.month),
    _question("document_year", "Which year is the document from?", Number(minimum=2000, maximum=2099),
              lambda f: f.date.year),
    _question("document_reference", "What is the document's own reference?", Regex(pattern=_REFERENCE),
              lambda f: f.reference),
    _question("due_date", "What is the deadline, as YYYY-MM-DD, or none?", _or_none(_DATE), lambda f: f.due),
    _question("has_deadline", "Is a deadline given, yes or no?", _YES_OR_NO, lambda f: f.due is not None),
    _question("total_amount", "What is the total amount, as a plain number with two decimals, or none?",
              _or_none(_AMOUNT), _amount),
    _question("currency", f"In which currency is the total amount: {_listed(CURRENCIES)}, or none?",
              _labels(*CURRENCIES, NONE), lambda f: None if f.total is None else f.currency),
    _question("above_thousand", "Is the total amount above 1000, yes, no or none?", _labels("yes", "no", NONE),
              lambda f: None if f.total is None else f.total > 1000),
    _question("contact_email", "Which e-mail address is given, or none?", _or_none(_EMAIL), lambda f: f.email, 24),
    _question("contact_phone", "Which phone number is given, or none?", _or_none(r"555-\d{4}"), lambda f: f.phone),
    _question("company", "Which company is it about, or none?", _or_none(r"[A-Z][a-z]{1,12} [A-Z][a-z]{1,12}"),
              lambda f: f.company),
    _question("city", "In which city is it, or none?", _or_none("[A-Z][a-z]{1,12}"), lambda f: f.city),
    _question("cost_centre", "Which cost centre is named, or none?", _or_none(r"[1-9]\d\d"), lambda f: f.cost_centre),
    _question("product", "Which product is it about, or none?", _labels(*MATERIAL["products"], NONE),
              lambda f: f.product),
    _question("topic", f"What is the topic: {_listed(_TOPICS)}?", Label(labels=_TOPICS), lambda f: f.topic),
    _question("team", "Which team should handle it: "
              "finance (billing, budget), support (hardware, software), logistics (delivery, stock), "
              "personnel (hiring, training) or legal (contract, privacy)?", Label(labels=_TEAMS), lambda f: f.team),
    _question("priority", "How urgent is it: high, normal or low?", _labels("high", "normal", "low"),
              lambda f: f.priority),
    _question("decision", "Was the request approved, rejected or is it open?", _labels("approved", "rejected", "open"),
              lambda f: f.decision),
    _question("satisfaction", "Is the customer happy, unhappy or neutral?", _labels("happy", "unhappy", "neutral"),
              lambda f: f.satisfaction),
    _question("has_attachment", "Is something attached, yes or no?", _YES_OR_NO, lambda f: f.attachment),
    _question("needs_reply", "Is a reply wanted, yes or no?", _YES_OR_NO, lambda f: f.reply),
    _question("count_items", "How many different items are listed?", Number(minimum=1, maximum=9),
              lambda f: len(f.items)),
    _question("count_people", "How many other people are named in the heading's list?", Number(minimum=1, maximum=9),
              lambda f: len(f.people)),
    _question("first_item", "Which item is listed first?", _PRODUCTS, lambda f: f.items[0].name),
    _question("last_quantity", "What is the quantity of the item listed last?", Number(minimum=1, maximum=99),
              lambda f: f.items[-1].quantity),
    _question("contact_json", "Give the sender and the reference as JSON with the keys sender and reference.",
              _object(sender=_text(_NAME), reference=_text(_REFERENCE)),
              lambda f: {"sender": f.sender, "reference": f.reference}, 40),
    _question("payment_json",
              "Give the total amount and the deadline as JSON with the keys total and due; none where missing.",
              _object(total=_text(f"{_AMOUNT}|{NONE}"), due=_text(f"{_DATE}|{NONE}")),
              lambda f: {"total": _amount(f) or NONE, "due": str(f.due or NONE)}, 48),
    _question("routing_json", "Give the team and the urgency as JSON with the keys team and priority.",
              _object(team={"enum": list(_TEAMS)}, priority={"enum": ["high", "normal", "low"]}),
              lambda f: {"team": f.team, "priority": f.priority}, 24),
)  # fmt: skip
