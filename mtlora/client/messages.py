"""Messages of text requests, and their answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Self, cast

from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.client.errors import ServerError, StatusOf
from mtlora.client.images import ImageSource, is_image, make_image

# A text for a template with one field, named fields, the messages of a chat, or a whole prompt's token ids.
Input = str | Mapping[str, str] | Sequence[Mapping[str, str]] | Sequence[int]
_LISTS = ("allowed_tokens", "banned_tokens", "stop_token_ids")


def value_of(text: str, answer_type: str) -> Any:
    """Convert an answer's text to a value: a Decimal, a date, a JSON value, or the text itself.

    answer_type: from the reply; in a stream, the last message has it.
    """
    kind, _, format = answer_type.partition(" ")
    match kind:
        case "":
            return text
        case "number":
            return Decimal(text.strip())
        case "date":
            return datetime.strptime(text.strip(), format).date()
        case "json":
            return json.loads(text)
    return text.strip()


class _Typed:
    """What a text of a type stands for."""

    text: str
    answer_type: str

    @property
    def value(self) -> Any:
        """See `value_of`."""
        return value_of(self.text, self.answer_type)


@dataclass(frozen=True)
class Sample(_Typed):
    """One of several answers; see Sample in the gRPC contract. answer_type: that of its Answer."""

    text: str
    finish_reason: pb.FinishReason
    logprobs: list[pb.TokenLogprobs]
    reasoning: str
    token_ids: list[int]
    cumulative_logprob: float | None
    working_tokens: int
    completion_tokens: int
    answer_type: str = ""

    @classmethod
    def of(cls, sample: pb.Sample, answer_type: str) -> Self:
        return cls(
            sample.text,
            sample.finish_reason,
            list(sample.logprobs),
            sample.reasoning,
            list(sample.token_ids),
            sample.cumulative_logprob if sample.HasField("cumulative_logprob") else None,
            sample.working_tokens,
            sample.completion_tokens,
            answer_type,
        )


@dataclass(frozen=True)
class Answer(_Typed):
    """reasoning: the model's text before its answer, if requested.
    samples: every answer if several were asked for, the one of this object first. token_ids, prompt_logprobs: if asked
    for. answer_type: what the text was held to, empty if it was free.
    """

    text: str
    summary: pb.Summary
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    reasoning: str = ""
    samples: list[Sample] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    answer_type: str = ""

    @classmethod
    def of(cls, reply: pb.GenerateResponse) -> Self:
        return cls(
            reply.text,
            reply.summary,
            list(reply.logprobs),
            reply.reasoning,
            [Sample.of(each, reply.answer_type) for each in reply.samples],
            list(reply.token_ids),
            list(reply.prompt_logprobs),
            reply.answer_type,
        )


@dataclass(frozen=True)
class Score:
    """The result of one input: the likeliest label and each label's probability, likeliest first, or an error."""

    label: str = ""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    reasoning: str = ""
    summary: pb.Summary | None = None
    error: ServerError | None = None

    @classmethod
    def of(cls, score: pb.InputScore) -> Self:
        if score.status.code:
            return cls(error=ServerError(StatusOf(score.status)))
        found = {each.label: each.probability for each in score.probabilities}
        return cls(score.label, found, score.reasoning, score.summary)


def make_score(
    task_id: str, inputs: Iterable[Any], *, uncalibrated: bool = False, routing_key: str = ""
) -> pb.ScoreRequest:
    """The message for many inputs, texts or images; the key applies to all of them."""
    made = pb.ScoreRequest(task_id=task_id, uncalibrated=uncalibrated)
    for each in inputs:
        if is_image(each):
            made.inputs.add(image=make_image(each), routing_key=routing_key)
            continue
        request = make_request(task_id, each)
        if given := request.WhichOneof("input"):
            made.inputs.add(**{given: getattr(request, given)}, routing_key=routing_key)
    return made


@dataclass(frozen=True)
class BatchAnswer:
    """The result of one batch item: an answer, or an error. index: the item's index in the batch."""

    index: int
    answer: Answer | None = None
    error: ServerError | None = None

    @classmethod
    def of(cls, item: pb.BatchItem) -> Self:
        if item.status.code:
            return cls(item.index, error=ServerError(StatusOf(item.status)))
        return cls(item.index, Answer.of(item.response))

    def result(self) -> Answer:
        """The answer. Raises ServerError."""
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer


@dataclass(frozen=True)
class DocumentAnswer(BatchAnswer):
    """The answer, or the error, of one task of a document. document_id: names the document in later calls."""

    document_id: str = ""

    @classmethod
    def about(cls, document_id: str, item: pb.BatchItem) -> Self:
        """Make the object from an item of a reply."""
        return replace(cls.of(item), document_id=document_id)


# A task's id, or its id and the values of its own fields, or a complete message.
DocumentTask = str | tuple[str, Mapping[str, str]] | pb.DocumentTask


def make_analysis(
    tasks: Iterable[DocumentTask], document: str | None = None, *, document_id: str = "", **parameters: Any
) -> pb.AnalyzeRequest:
    """The message for many tasks of one document, sent as text or by id. Whole messages ignore `parameters`."""
    request = (
        pb.AnalyzeRequest(document=document) if document is not None else pb.AnalyzeRequest(document_id=document_id)
    )
    for task in tasks:
        if isinstance(task, pb.DocumentTask):
            request.tasks.append(task)
            continue
        task_id, fields = (task, {}) if isinstance(task, str) else task
        made = make_request(task_id, fields, **parameters)
        request.tasks.add(
            task_id=task_id,
            fields=made.fields,
            parameters=made.parameters,
            include_reasoning=made.include_reasoning,
            routing_key=made.routing_key,
            free=made.free,
            answer=made.answer if made.HasField("answer") else None,
        )
    return request


def make_batch(items: Iterable[tuple[str, Input] | pb.GenerateRequest], **parameters: Any) -> pb.GenerateBatchRequest:
    """The message for many inputs: pairs (task id, input), to which `parameters` apply, or complete requests."""
    return pb.GenerateBatchRequest(
        items=[each if isinstance(each, pb.GenerateRequest) else make_request(*each, **parameters) for each in items]
    )


def make_request(
    task_id: str,
    input: Input = "",
    *,
    image: ImageSource | None = None,
    without_adapter: bool = False,
    include_reasoning: bool = False,
    routing_key: str = "",
    free: bool = False,
    answer: pb.AnswerType | None = None,
    **parameters: Any,
) -> pb.GenerateRequest:
    """The message for one input. `parameters` are those of GenerationParameters.

    image: for a task of text and image; without other fields, the task needs no `input`. Raises OSError for a file that
    cannot be read. `stop` is a list of strings, `logit_bias` a mapping from token ids, lists of tokens are lists of
    ids.
    """
    request = pb.GenerateRequest(
        task_id=task_id,
        without_adapter=without_adapter,
        include_reasoning=include_reasoning,
        routing_key=routing_key,
        free=free,
        answer=answer,
        image=None if image is None else make_image(image),
    )
    if isinstance(input, str):
        if input or image is None:
            request.text = input
    elif isinstance(input, Mapping):
        request.fields.values.update(input)
        request.fields.SetInParent()
    elif input and isinstance(input[0], int):
        request.token_ids.values.extend(cast(Sequence[int], input))
    else:
        request.chat.messages.extend(pb.ChatMessage(**message) for message in cast(Sequence[Mapping[str, str]], input))
        request.chat.SetInParent()
    if (stop := parameters.pop("stop", None)) is not None:
        request.parameters.stop.values.extend(stop)
        request.parameters.stop.SetInParent()
    if (biases := parameters.pop("logit_bias", None)) is not None:
        request.parameters.logit_bias.values.update(biases)
        request.parameters.logit_bias.SetInParent()
    for name in _LISTS:
        if (tokens := parameters.pop(name, None)) is not None:
            getattr(request.parameters, name).values.extend(tokens)
            getattr(request.parameters, name).SetInParent()
    request.parameters.MergeFrom(pb.GenerationParameters(**parameters))
    return request
