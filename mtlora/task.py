"""A task: how its input becomes a prompt, and when its answer ends. One rule for trainer, evaluation and server."""

import string
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from mtlora.errors import MtLoRAError

TASK_ID_PATTERN = r"^[a-z0-9][a-z0-9_.\-]{0,127}$"
TaskId = Annotated[str, StringConstraints(pattern=TASK_ID_PATTERN)]


class TemplateError(MtLoRAError):
    """A prompt template that cannot be used, or fields that do not fit it."""


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


class TaskSpec(BaseModel):
    """What a task is, apart from any weights: the entry of a suite and of a checkpoint's task table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: TaskId
    description: str = Field(min_length=1, max_length=2000)
    template: str = Field("{input}\nAnswer:", min_length=1, max_length=20_000)
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...] = Field(("\n",), max_length=8)
    max_new_tokens: int = Field(32, ge=1, le=4096)
    allowed_answers: tuple[str, ...] | None = Field(None, description="the closed set of answers, where there is one")

    @field_validator("template")
    @classmethod
    def _template_has_fields(cls, template: str) -> str:
        if not template_fields(template):
            raise ValueError("template names no field; it needs at least one, such as {input}")
        return template

    @field_validator("allowed_answers")
    @classmethod
    def _answers_are_distinct(cls, answers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if answers is not None and (len(answers) < 2 or len(set(answers)) != len(answers) or "" in answers):
            raise ValueError("allowed_answers must be at least two distinct, non-empty answers")
        return answers

    @model_validator(mode="after")
    def _answers_do_not_stop_themselves(self) -> "TaskSpec":
        for answer in self.allowed_answers or ():
            for stop in self.stop:
                if stop in answer:
                    raise ValueError(f"allowed answer {answer!r} contains the stop string {stop!r}")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """The template's field names."""
        return template_fields(self.template)

    def render(self, values: str | Mapping[str, str]) -> str:
        """The prompt for one input. A bare string fills the only field of a one-field template.

        Raises TemplateError naming fields that are missing or unknown.
        """
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
        return self.template.format_map(dict(values))


def normalise_answer(text: str) -> str:
    """The form in which two answers are compared: outer blanks dropped, inner runs of blanks made one."""
    return " ".join(text.split())


def is_correct(answer: str, target: str) -> bool:
    """Exact match after `normalise_answer`."""
    return normalise_answer(answer) == normalise_answer(target)
