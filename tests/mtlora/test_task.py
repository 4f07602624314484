"""Templates and tasks: what renders, and what is refused."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtlora.task import TaskSpec, TemplateError, is_correct, normalise_answer, template_fields

NAMES = st.text(string.ascii_lowercase + "_é", min_size=1, max_size=8).filter(str.isidentifier)


def spec(**fields: object) -> TaskSpec:
    return TaskSpec.model_validate({"id": "t", "description": "d"} | fields)


def test_one_text_fills_the_only_field() -> None:
    assert spec(template="Q: {input}\nA:").render("why?") == "Q: why?\nA:"


def test_fields_are_named_in_order_of_first_use() -> None:
    task = spec(template="{b} {a} {b}")
    assert task.fields == ("b", "a")
    assert task.render({"a": "1", "b": "2"}) == "2 1 2"


def test_double_braces_are_braces() -> None:
    assert spec(template='{{"q": "{input}"}}').render("x") == '{"q": "x"}'


@given(st.text())
def test_a_value_is_never_a_template(value: str) -> None:
    assert spec(template="<{input}>").render(value) == f"<{value}>"


@given(st.lists(st.tuples(st.text("abc {}\n"), NAMES), min_size=1, max_size=5), st.data())
def test_any_well_formed_template_renders(parts: list[tuple[str, str]], data: st.DataObject) -> None:
    template = "".join(text.replace("{", "{{").replace("}", "}}") + f"{{{name}}}" for text, name in parts)
    values = {name: data.draw(st.text(), label=name) for _, name in parts}
    task = spec(template=template)
    assert task.fields == tuple(dict.fromkeys(name for _, name in parts))
    assert task.render(values) == "".join(text + values[name] for text, name in parts)


@given(st.text("{}[]!:.0ab_ >"))
def test_any_text_is_a_template_or_a_template_error(template: str) -> None:
    try:
        fields = template_fields(template)
    except TemplateError:
        return
    assert all(name.isidentifier() for name in fields)
    template.format_map(dict.fromkeys(fields, "x"))


@pytest.mark.parametrize(
    "template",
    [
        "{}", "{0}", "{input.__class__}", "{input[0]}", "{input!r}", "{input!s}", "{input:>10}", "{input:{width}}",
        "{input:999999999}", "{ input}", "{in put}", "{input", "input}", "{{input}", "{input}}", "{input!}",
        "{__class__.x}", "{-1}", "{a-b}",
    ],
)  # fmt: skip
def test_refuses_template_fields_that_are_no_plain_names(template: str) -> None:
    with pytest.raises(TemplateError):
        template_fields(template)
    with pytest.raises(ValidationError, match="template"):
        spec(template=template)


def test_refuses_a_template_without_a_field() -> None:
    with pytest.raises(ValidationError, match="at least one"):
        spec(template="no field {{input}}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("one text", "takes fields a, b, not one text"),
        ({"a": "1"}, "missing b; it takes a, b"),
        ({"a": "1", "b": "2", "c": "3"}, "unknown c; it takes a, b"),
        ({"c": "3"}, "missing a, b; unknown c"),
    ],
)
def test_render_names_missing_and_unknown_fields(values: str | dict[str, str], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        spec(template="{a}{b}").render(values)


@pytest.mark.parametrize("task_id", ["", "A", "a b", "-a", ".a", "a/b", "a" * 129, "a\n", "ä", "../a", "a#b"])
def test_refuses_wrong_task_ids(task_id: str) -> None:
    with pytest.raises(ValidationError, match="id"):
        spec(id=task_id)


@pytest.mark.parametrize("task_id", ["a", "0", "a.b-c_d", "a" * 128])
def test_accepts_valid_task_ids(task_id: str) -> None:
    assert spec(id=task_id).id == task_id


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 65]}, "stop"),
        ({"stop": ["x"] * 9}, "stop"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"allowed_answers": ["yes"]}, "allowed_answers"),
        ({"allowed_answers": ["yes", "yes"]}, "distinct"),
        ({"allowed_answers": ["yes", ""]}, "non-empty"),
        ({"allowed_answers": ["a b", "c"], "stop": [" "]}, "'a b' contains the stop string ' '"),
        ({"description": ""}, "description"),
        ({"temperature": 1}, "temperature"),
    ],
)
def test_refuses_wrong_task_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**fields)


@given(st.text())
def test_normalising_is_idempotent_and_keeps_words(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert once.split() == text.split()


def test_exact_match_compares_words_and_case() -> None:
    assert is_correct("  (A)\n", "(A)")
    assert is_correct("a  b", "a b")
    assert not is_correct("a", "A")
    assert not is_correct("ab", "a b")


def test_split_answer_separates_working_and_answer() -> None:
    task = TaskSpec(id="t", description="d", answer_marker="=>")
    assert task.worked_answer("3+4=7", "7") == "3+4=7 => 7"
    assert task.split_answer(" 3+4=7 => 7") == (" 3+4=7 ", " 7")
    assert task.final_answer(" 3+4=7 => 7 => 8 ") == "7 => 8"
    assert task.final_answer(" 7 ") == "7"
    assert task.worked_answer(None, "7") == task.worked_answer("", "7") == "7"
    plain = TaskSpec(id="t", description="d")
    assert plain.final_answer(" a => b ") == "a => b"
    for spec, working, target in ((plain, "w", "7"), (task, "a => b", "7"), (task, "w", "=>"), (task, "a\nb", "7")):
        with pytest.raises(TemplateError):
            spec.worked_answer(working, target)


def test_json_leaves_out_an_unset_marker() -> None:
    spec = TaskSpec(id="t", description="d")
    assert set(spec.model_dump()) == {"id", "description", "template", "stop", "max_new_tokens", "allowed_answers"}
    marked = TaskSpec(id="t", description="d", answer_marker="=>")
    assert TaskSpec.model_validate_json(marked.model_dump_json()) == marked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer_marker": ""}, "at least 1 character"),
        ({"answer_marker": "  "}, "is blank"),
        ({"answer_marker": "=\n>"}, "contains the stop string"),
        ({"answer_marker": "s", "allowed_answers": ("Yes", "No")}, "contains the answer marker 's'"),
    ],
)
def test_refuses_wrong_markers(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TaskSpec.model_validate({"id": "t", "description": "d", **fields})


def test_a_document_part_comes_first() -> None:
    task = spec(document_template="Document:\n{document}\n", template="Who sent it?\nAnswer:")
    assert task.fields == ("document",)
    assert task.parts("Hi.") == ("Document:\nHi.\n", "Who sent it?\nAnswer:")
    assert task.render("Hi.") == "Document:\nHi.\nWho sent it?\nAnswer:"
    asked = spec(document_template="{document}", template=" {question}")
    assert asked.fields == ("document", "question")
    assert asked.parts({"document": "a", "question": "b"}) == ("a", " b")
    assert spec().parts("x") == ("", spec().render("x"))
    assert "document_template" not in spec().model_dump()
    assert TaskSpec.model_validate_json(asked.model_dump_json()) == asked


@given(document=st.text(min_size=1), question=st.text(), other=st.text())
def test_the_document_part_depends_on_the_document_alone(document: str, question: str, other: str) -> None:
    one = spec(document_template="<{document}>", template="{question}")
    two = spec(id="two", document_template="<{document}>", template="Reply.")
    first = one.parts({"document": document, "question": question}).document
    assert first == one.parts({"document": document, "question": other}).document == two.parts(document).document


@pytest.mark.parametrize(
    ("document_template", "template", "message"),
    [
        (
            "{document} {id}",
            "{id}",
            r"document_template names \{document\}, \{id\}; it needs \{document\} and no other",
        ),
        ("Text", "Reply.", r"document_template names no field; it needs \{document\}"),
        ("{document}", "About {document}:", r"template names \{document\}, which belongs to document_template alone"),
        ("{document!r}", "Reply.", "must be a plain name"),
        ("", "Reply.", "at least 1 character"),
        (None, "Reply.", "template names no field"),
    ],
)
def test_refuses_a_document_part_that_depends_on_more(
    document_template: str | None, template: str, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(document_template=document_template, template=template)


@pytest.mark.parametrize(
    "defaults", [{"allowed_tokens": [1]}, {"banned_tokens": [5]}, {"stop_token_ids": [3]}, {"min_new_tokens": 4}]
)
@pytest.mark.parametrize("answer", [{"answer": {"type": "date"}}, {"allowed_answers": ["a", "b"]}])
def test_defaults_that_contradict_a_type_are_refused(defaults: dict[str, object], answer: dict[str, object]) -> None:
    assert spec(defaults=defaults)
    with pytest.raises(ValidationError, match=f"defaults: {next(iter(defaults))}"):
        spec(defaults=defaults, **answer)
