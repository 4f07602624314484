"""Converts the server's data to messages of the gRPC contract."""

from collections.abc import Sequence
from typing import Any

from google.rpc import status_pb2
from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.parameters import TaskDefaults
from mtlora.task import TaskSpec
from mtlora.vision.image_input import ImagePreparation
from server.job import Delta, ServedTask, TokenLogprob, TokenLogprobs
from server.rpc import answers
from server.rpc.batch import TextItem, answering
from server.rpc.classify import Classification, ImageItem
from server.rpc.generation import Generation
from server.rpc.scoring import Scoring

_FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def task(served: ServedTask) -> pb.Task:
    spec = served.spec
    message = pb.Task(
        id=spec.id,
        description=spec.description,
        allowed_answers=spec.labels or (),
        adapter_name=served.adapter_name,
        adapter_version=served.adapter_version,
        answer=answers.message(spec.answer_type) if spec.answer_type else None,
        calibration=served.calibration,
        activation=served.activation,
        image=_preparation(spec.image) if spec.image else None,
    )
    if spec.image is None:
        message.MergeFrom(_text_fields(spec))
    return message


def _text_fields(spec: TaskSpec) -> pb.Task:
    """The fields of tasks that generate a text."""
    return pb.Task(
        template=spec.template,
        fields=spec.fields,
        stop=spec.stop,
        max_new_tokens=spec.max_new_tokens,
        answer_marker=spec.answer_marker or "",
        document_template=spec.document_template or "",
        picture=_preparation(spec.picture) if spec.picture else None,
        defaults=_parameters(spec.defaults) if spec.defaults else None,
    )


def _preparation(image: ImagePreparation) -> pb.ImagePreparation:
    return pb.ImagePreparation(size=image.size, resize=image.resize, mean=image.mean, std=image.std)


def _parameters(defaults: TaskDefaults) -> pb.GenerationParameters:
    message = pb.GenerationParameters()
    for name, value in defaults.given.items():
        if name == "logit_bias":
            message.logit_bias.SetInParent()
            message.logit_bias.values.update(value)
        elif isinstance(value, tuple):
            getattr(message, name).SetInParent()
            getattr(message, name).values.extend(value)
        else:
            setattr(message, name, value)
    return message


def response(generation: Generation) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        **_content(generation),
        summary=summary(generation),
        prompt_logprobs=[token_logprobs(token) for token in generation.prompt_logprobs],
        answer_type=generation.job.answer_type,
    )


def _content(generation: Generation) -> dict[str, Any]:
    """The fields that an answer and a sample share."""
    job = generation.job
    return {
        "text": generation.answer,
        "logprobs": [token_logprobs(token) for token in generation.logprobs],
        "reasoning": generation.reasoning.strip() if job.include_reasoning else "",
        "token_ids": generation.token_ids if job.return_token_ids else (),
    }


def item_response(item: TextItem) -> pb.GenerateResponse:
    """The reply to an input with one or more samples."""
    best = answering(item.generations)
    message = response(best[0])
    if len(item.generations) > 1:
        _sum_up(message.summary, item.generations)
        # The first drawn sample has the prompt's values; it may not be the best one.
        del message.prompt_logprobs[:]
        message.prompt_logprobs.extend(token_logprobs(token) for token in item.generations[0].prompt_logprobs)
    if len(best) > 1:
        message.samples.extend(_sample(each) for each in best)
    return message


def batch_item(item: TextItem) -> pb.BatchItem:
    if item.failure is not None:
        return pb.BatchItem(index=item.index, status=item.failure.status())
    return pb.BatchItem(index=item.index, status=status_pb2.Status(), response=item_response(item))


def _sample(generation: Generation) -> pb.Sample:
    return pb.Sample(
        **_content(generation),
        finish_reason=_FINISH_REASONS[generation.finish_reason or "length"],
        cumulative_logprob=generation.cumulative_logprob,
        working_tokens=generation.working_tokens,
        completion_tokens=generation.completion_tokens,
    )


def stream_response(delta: Delta, generation: Generation) -> pb.GenerateStreamResponse:
    """One message of a stream; that of the last delta carries the summary."""
    return pb.GenerateStreamResponse(
        text=delta.text,
        logprobs=[token_logprobs(token) for token in delta.logprobs],
        summary=summary(generation) if delta.finish_reason else None,
        reasoning=delta.reasoning if generation.job.include_reasoning else "",
        token_ids=delta.token_ids if generation.job.return_token_ids else (),
        prompt_logprobs=[token_logprobs(token) for token in delta.prompt_logprobs],
        answer_type=generation.job.answer_type if delta.finish_reason else "",
    )


def summary(generation: Generation) -> pb.Summary:
    served = generation.job.task
    alone = generation.job.without_adapter
    message = pb.Summary(
        request_id=generation.call.request_id,
        task_id=served.spec.id,
        adapter_name="" if alone else served.adapter_name,
        adapter_version="" if alone else served.adapter_version,
        finish_reason=_FINISH_REASONS[generation.finish_reason or "length"],
        prompt_tokens=len(generation.job.prompt_ids),
        cached_tokens=generation.cached_tokens,
        working_tokens=generation.working_tokens,
        completion_tokens=generation.completion_tokens,
    )
    _set_timings(message.timings, generation.queue_s, generation.ttft_s, generation.total_s)
    return message


def _sum_up(message: pb.Summary, drawn: Sequence[Generation]) -> None:
    """Make a summary count all samples that were drawn."""
    message.prompt_tokens = sum(len(each.job.prompt_ids) for each in drawn)
    message.cached_tokens = sum(each.cached_tokens for each in drawn)
    message.working_tokens = sum(each.working_tokens for each in drawn)
    message.completion_tokens = sum(each.completion_tokens for each in drawn)
    queue_s, first_s = (min(getattr(each, name) for each in drawn) for name in ("queue_s", "ttft_s"))
    _set_timings(message.timings, queue_s, first_s, max(each.total_s for each in drawn))


def score(item: TextItem | ImageItem) -> pb.InputScore:
    """The message with one input's labels, or with its error."""
    if item.failure is not None:
        return pb.InputScore(status=item.failure.status())
    (scoring,) = item.generations
    if isinstance(scoring, Classification):
        return pb.InputScore(**_labels(scoring), summary=_image_summary(scoring))
    assert isinstance(scoring, Scoring)
    return pb.InputScore(**_labels(scoring), reasoning=scoring.reasoning.strip(), summary=summary(scoring))


def classification(item: ImageItem, image: int) -> pb.Classification:
    """The message with an image's labels by one task, or with its error. image: its index in the request."""
    assert item.task is not None
    task_id = item.task.spec.id
    if item.failure is not None:
        return pb.Classification(image=image, task_id=task_id, status=item.failure.status())
    (found,) = item.generations
    return pb.Classification(image=image, task_id=task_id, **_labels(found), summary=_image_summary(found))


def _labels(found: Scoring | Classification) -> dict[str, Any]:
    probabilities = [pb.LabelProbability(label=label, probability=p) for label, p in found.probabilities]
    return {"label": found.probabilities[0][0], "probabilities": probabilities}


def _image_summary(found: Classification) -> pb.Summary:
    served = found.job.task
    message = pb.Summary(
        request_id=found.call.request_id,
        task_id=served.spec.id,
        adapter_name=served.adapter_name,
        adapter_version=served.adapter_version,
        finish_reason=_FINISH_REASONS[found.finish_reason],
        prompt_tokens=len(found.job.prompt_ids),
    )
    _set_timings(message.timings, found.queue_s, found.total_s, found.total_s)
    return message


def _set_timings(timings: pb.Timings, queue_s: float, first_token_s: float, total_s: float) -> None:
    timings.queue.FromNanoseconds(int(queue_s * 1e9))
    timings.time_to_first_token.FromNanoseconds(int(first_token_s * 1e9))
    timings.total.FromNanoseconds(int(total_s * 1e9))


def token_logprobs(token: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(chosen=_token(token.chosen), top=[_token(each) for each in token.top])


def _token(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token.token_id, token=token.token, logprob=token.logprob)
