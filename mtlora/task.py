"""A task defines how its input, with or without an image, becomes a prompt, and when its answer ends.

An image task has no text: its input is an image and its answer a label.

Trainer, evaluation and server all use this module.
"""

import string
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Final, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from mtlora.answer import AnswerError, AnswerType, Label
from mtlora.answer.constraint import Constraint
from mtlora.config import MtLoRAConfig
from mtlora.errors import MtLoRAError
from mtlora.parameters import AGAINST_TYPES, TaskDefaults
from mtlora.vision.image_input import ImageInput, ImagePreparation

TASK_ID_PATTERN = r"^[a-z0-9][a-z0-9_.\-]{0,127}$"
TaskId = Annotated[str, StringConstraints(pattern=TASK_ID_PATTERN)]


# The only field of a document part.
DOCUMENT: Final = "document"
# The field that marks the image's position in the template of a text task that takes one.
IMAGE: Final = "image"
# Fields that mean nothing to a task of images.
_OF_TEXT: Final = ("document_template", "template", "stop", "max_new_tokens", "answer_marker", "defaults", "picture")


class TemplateError(MtLoRAError):
    """A prompt template that cannot be used, or fields that do not fit it."""


@lru_cache(maxsize=4096)
def template_fields(template: str) -> tuple[str, ...]:
    """Names of a template's `{fields}`, in order of first use. `{{` and `}}` stand for braces.

    Raises TemplateError on anything beyond plain names: conversions, format specs, attributes, positions.
    """
    fields: dict[str, None] = {}
    try:
        for _, name, spec, conversion in string.Formatter().parse(template):
            if name is None:
                continue
            if not name.isidentifier() or spec or conversion:
                raise TemplateError(f"template field {{{name}}} must be a plain name such as {{input}}")
            fields[name] = None
    except ValueError as error:
        raise TemplateError(f"template {template!r}: {error}") from None
    return tuple(fields)


@lru_cache(maxsize=4096)
def _around_image(template: str) -> tuple[str, ...]:
    """The templates before and after each `{image}` of a template."""
    parts = [""]
    for literal, name, _, _ in string.Formatter().parse(template):
        parts[-1] += literal.replace("{", "{{").replace("}", "}}")
        if name == IMAGE:
            parts.append("")
        elif name is not None:
            parts[-1] += f"{{{name}}}"
    return tuple(parts)


class PromptParts(NamedTuple):
    """A rendered prompt: the document's part, the same for all tasks that share it, and the task's own part.

    document: empty for a task without a document part.
    """

    document: str
    task: str


class TaskSpec(BaseModel):
    """The definition of a task without weights, used in suites and in checkpoints' task tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: TaskId
    description: str = Field(min_length=1, max_length=2000)
    document_template: str | None = Field(
        None,
        min_length=1,
        max_length=20_000,
        description="the document's part of the prompt, before `template`; its only field is {document}",
        exclude_if=lambda template: template is None,
    )
    template: str = Field("{input}\nAnswer:", min_length=1, max_length=20_000)
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...] = Field(("\n",), max_length=8)
    max_new_tokens: int = Field(32, ge=1, le=4096)
    allowed_answers: tuple[str, ...] | None = Field(
        None, description="the closed set of answers; the same as an `answer` of type label"
    )
    answer: AnswerType | None = Field(
        None, description="what an answer may be; null for any text", exclude_if=lambda answer: answer is None
    )
    # Fields left out of JSON if unset.
    answer_marker: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None,
        description="the mark between working and answer in a generated text; null if all of it is the answer",
        exclude_if=lambda marker: marker is None,
    )
    defaults: TaskDefaults | None = Field(
        None,
        description="the task's own values of parameters that a request may set",
        exclude_if=lambda defaults: defaults is None,
    )
    image: ImageInput | None = Field(
        None,
        description="of a task of images: how an image becomes its input; such a task has labels and no text",
        exclude_if=lambda image: image is None,
    )

    picture: ImagePreparation | None = Field(
        None,
        description="of a text task that takes an image: how it is prepared; `template` names {image} once, where the "
        "image's soft tokens stand",
        exclude_if=lambda picture: picture is None,
    )

    @field_serializer("defaults")
    def _given_defaults(self, defaults: TaskDefaults | None) -> dict[str, object] | None:
        return None if defaults is None else dict(defaults.given)

    @field_validator("document_template")
    @classmethod
    def _document_is_the_only_field(cls, template: str | None) -> str | None:
        if template is not None and (found := template_fields(template)) != (DOCUMENT,):
            named = ", ".join(f"{{{name}}}" for name in found) or "no field"
            raise ValueError(f"document_template names {named}; it needs {{{DOCUMENT}}} and no other field")
        return template

    @field_validator("template")
    @classmethod
    def _template_has_fields(cls, template: str, info: ValidationInfo) -> str:
        found = template_fields(template)
        if info.data.get("document_template") is None:
            if not found:
                raise ValueError("template names no field; it needs at least one, such as {input}")
        elif DOCUMENT in found:
            raise ValueError(f"template names {{{DOCUMENT}}}, which belongs to document_template alone")
        return template

    @field_validator("allowed_answers")
    @classmethod
    def _answers_are_distinct(cls, answers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if answers is not None and (len(answers) < 2 or len(set(answers)) != len(answers) or "" in answers):
            raise ValueError("allowed_answers must be at least two distinct, non-empty answers")
        return answers

    @model_validator(mode="after")
    def _answers_do_not_stop_themselves(self) -> "TaskSpec":
        if self.allowed_answers and self.answer is not None:
            raise ValueError("allowed_answers and answer are both set; answer alone will do")
        for answer in self.labels or ():
            for stop in self.stop:
                if stop in answer:
                    raise ValueError(f"allowed answer {answer!r} contains the stop string {stop!r}")
            if self.answer_marker and self.answer_marker in answer:
                raise ValueError(f"allowed answer {answer!r} contains the answer marker {self.answer_marker!r}")
        if self.answer_marker is not None:
            if not self.answer_marker.strip():
                raise ValueError("answer_marker is blank; it needs a mark such as =>")
            for stop in self.stop:
                if stop in self.answer_marker:
                    raise ValueError(f"answer_marker {self.answer_marker!r} contains the stop string {stop!r}")
        return self

    @model_validator(mode="after")
    def _shortest_answer_fits(self) -> "TaskSpec":
        least = self.defaults.min_new_tokens if self.defaults else None
        if least is not None and least > self.max_new_tokens:
            raise ValueError(f"defaults: min_new_tokens: found {least}, above max_new_tokens, {self.max_new_tokens}")
        return self

    @model_validator(mode="after")
    def _defaults_fit_the_type(self) -> "TaskSpec":
        given = self.defaults.given if self.defaults and self.answer_type else {}
        if found := next((name for name in AGAINST_TYPES if given.get(name)), None):
            raise ValueError(f"defaults: {found}: found one; allowed: none, as the task has a type of answer")
        return self

    @model_validator(mode="after")
    def _an_image_leaves_no_text(self) -> "TaskSpec":
        if self.image is None:
            return self
        if not self.labels:
            raise ValueError("image: a task of images needs labels: an answer of type label, or allowed_answers")
        for name in _OF_TEXT:
            if (found := getattr(self, name)) != TaskSpec.model_fields[name].default:
                raise ValueError(f"{name}: found {found!r}; allowed: the default, as a task of images has no text")
        return self

    @model_validator(mode="after")
    def _a_picture_has_its_place(self) -> "TaskSpec":
        if self.picture is None:
            return self
        if self.document_template is not None:
            raise ValueError("picture: a task with an image has no document_template")
        if (found := len(_around_image(self.template)) - 1) != 1:
            raise ValueError(f"template names {{{IMAGE}}} {found} times; a task with picture names it once")
        return self

    @property
    def answer_type(self) -> AnswerType | None:
        """The type of the answers; None for any text."""
        return _label(self.allowed_answers) if self.allowed_answers else self.answer

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed set of answers, if there is one."""
        answer = self.answer_type
        return answer.labels if isinstance(answer, Label) else None

    def constraint(self, *, without_adapter: bool = False) -> Constraint | None:
        """The constraint for the decoder; for the backbone alone, without the marker. None for images."""
        answer = None if self.image else self.answer_type
        return _constraint(answer, None if without_adapter else self.answer_marker, self.stop) if answer else None

    def check_answers(self) -> None:
        """Raise AnswerError if the decoder cannot enforce the answer type."""
        if constraint := self.constraint():
            try:
                constraint.compile()
            except AnswerError as error:
                raise AnswerError(f"task {self.id}: answer: {error}") from None

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the prompt's fields of text, the document's first."""
        own = template_fields(self.template)
        if self.picture is not None:
            return tuple(name for name in own if name != IMAGE)
        return own if self.document_template is None else (DOCUMENT, *own)

    def split_answer(self, text: str) -> tuple[str, str]:
        """(working, answer) of a generated text: the text before the first marker, and the text after it.

        Without a marker, all of the text is the answer. Splits at the first marker, so that the answer can be streamed
        from there on. Keeps blanks.
        """
        if self.answer_marker is None:
            return "", text
        working, found, answer = text.partition(self.answer_marker)
        return (working, answer) if found else ("", text)

    def final_answer(self, text: str) -> str:
        """The answer in a generated text, without outer blanks."""
        return self.split_answer(text)[1].strip()

    def worked_answer(self, working: str | None, target: str) -> str:
        """The text to train on: `working marker target`, or the target alone without working.

        Raises TemplateError if `split_answer` could not find the two parts again, or a stop string would cut them.
        """
        for name, part in (("working", working or ""), ("target", target)):
            if self.answer_marker and self.answer_marker in part:
                raise TemplateError(f"task {self.id}: {name} {part[:80]!r} contains the marker {self.answer_marker!r}")
        if not working:
            return target
        if self.answer_marker is None:
            raise TemplateError(f"task {self.id} has no answer_marker, so its examples cannot have working")
        for stop in self.stop:
            if stop in working:
                raise TemplateError(f"task {self.id}: working {working[:80]!r} contains the stop string {stop!r}")
        return f"{working} {self.answer_marker} {target}"

    def render(self, values: str | Mapping[str, str]) -> str:
        """The prompt for one input, both parts as one text. Raises TemplateError as `parts` does."""
        return "".join(self.parts(values))

    def parts(self, values: str | Mapping[str, str]) -> PromptParts:
        """The prompt for one input, without its image if it takes one. A bare string fills the only field.

        Raises TemplateError naming fields that are missing or unknown.
        """
        if self.picture is not None:
            return PromptParts("", "".join(self.around_image(values)))
        values = self._values(values)
        document = "" if self.document_template is None else self.document_template.format_map(values)
        return PromptParts(document, self.template.format_map(values))

    def around_image(self, values: str | Mapping[str, str]) -> tuple[str, str]:
        """The prompt's texts before and after the image; a task without other fields ignores a bare string.

        Raises TemplateError as `parts` does.
        """
        if not self.fields and isinstance(values, str):
            values = {}
        values = self._values(values)
        before, after = _around_image(self.template)
        return before.format_map(values), after.format_map(values)

    def _values(self, values: str | Mapping[str, str]) -> dict[str, str]:
        if isinstance(values, str):
            if len(self.fields) != 1:
                raise TemplateError(f"task {self.id} takes fields {', '.join(self.fields)}, not one text")
            values = {self.fields[0]: values}
        missing = [name for name in self.fields if name not in values]
        unknown = [name for name in values if name not in self.fields]
        if missing or unknown:
            parts = [f"missing {', '.join(missing)}"] if missing else []
            parts += [f"unknown {', '.join(unknown)}"] if unknown else []
            raise TemplateError(f"fields of task {self.id}: {'; '.join(parts)}; it takes {', '.join(self.fields)}")
        return dict(values)


def check_activation(config: MtLoRAConfig, tasks: Iterable[TaskSpec]) -> None:
    """Raise TemplateError unless every task has the document part that the adapter's activation needs."""
    if config.activation == "all":
        return
    for task in tasks:
        if task.document_template is None:
            raise TemplateError(
                f"tasks: document_template: expected one, as the adapter's activation is {config.activation!r}, "
                f"found none in task {task.id!r}"
            )


# Cached outside the spec: a spec with a cached value would not equal its copies.
@lru_cache(maxsize=4096)
def _label(labels: tuple[str, ...]) -> Label:
    return Label(labels=labels)


@lru_cache(maxsize=4096)
def _constraint(answer: AnswerType, marker: str | None, stop: tuple[str, ...]) -> Constraint:
    return Constraint(answer, marker, stop)


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: no outer blanks, one blank for each inner run of blanks."""
    return " ".join(text.split())


def is_correct(answer: str, target: str) -> bool:
    """Exact match after `normalise_answer`."""
    return normalise_answer(answer) == normalise_answer(target)
