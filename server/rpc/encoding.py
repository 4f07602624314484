"""From the server's data to the messages of the contract."""

from mtlora_pb.v1 import inference_pb2 as pb

from server.job import Delta, ServedTask, TokenLogprob, TokenLogprobs
from server.rpc import answers
from server.rpc.generation import Generation

_FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


def task(served: ServedTask) -> pb.Task:
    spec = served.spec
    return pb.Task(
        id=spec.id,
        description=spec.description,
        template=spec.template,
        fields=spec.fields,
        stop=spec.stop,
        max_new_tokens=spec.max_new_tokens,
        allowed_answers=spec.labels or (),
        adapter_name=served.adapter_name,
        adapter_version=served.adapter_version,
        answer_marker=spec.answer_marker or "",
        answer=answers.message(spec.answer_type) if spec.answer_type else None,
        calibration=served.calibration,
    )


def response(generation: Generation) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        text=generation.answer,
        summary=summary(generation),
        logprobs=[token_logprobs(token) for token in generation.logprobs],
        reasoning=generation.reasoning.strip() if generation.job.include_reasoning else "",
    )


def stream_response(delta: Delta, generation: Generation) -> pb.GenerateStreamResponse:
    """One message of a stream; the last delta's carries the summary."""
    return pb.GenerateStreamResponse(
        text=delta.text,
        logprobs=[token_logprobs(token) for token in delta.logprobs],
        summary=summary(generation) if delta.finish_reason else None,
        reasoning=delta.reasoning if generation.job.include_reasoning else "",
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
        completion_tokens=generation.completion_tokens,
    )
    message.timings.queue.FromNanoseconds(int(generation.queue_s * 1e9))
    message.timings.time_to_first_token.FromNanoseconds(int(generation.ttft_s * 1e9))
    message.timings.total.FromNanoseconds(int(generation.total_s * 1e9))
    return message


def token_logprobs(token: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(chosen=_token(token.chosen), top=[_token(each) for each in token.top])


def _token(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token.token_id, token=token.token, logprob=token.logprob)
