"""What a request says and what an answer holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mtlora_pb.v1 import inference_pb2 as pb

# A text for a one-field template, named fields, or the messages of a chat.
Input = str | Mapping[str, str] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Answer:
    """reasoning: what the model wrote before its answer, if it was asked for."""

    text: str
    summary: pb.Summary
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    reasoning: str = ""

    @classmethod
    def of(cls, reply: pb.GenerateResponse) -> Self:
        return cls(reply.text, reply.summary, list(reply.logprobs), reply.reasoning)


def make_request(
    task_id: str,
    input: Input,
    *,
    without_adapter: bool = False,
    include_reasoning: bool = False,
    routing_key: str = "",
    **parameters: Any,
) -> pb.GenerateRequest:
    """The message for one input. `parameters` are those of GenerationParameters; `stop` is a list of strings."""
    request = pb.GenerateRequest(
        task_id=task_id,
        without_adapter=without_adapter,
        include_reasoning=include_reasoning,
        routing_key=routing_key,
    )
    if isinstance(input, str):
        request.text = input
    elif isinstance(input, Mapping):
        request.fields.values.update(input)
        request.fields.SetInParent()
    else:
        request.chat.messages.extend(pb.ChatMessage(**message) for message in input)
        request.chat.SetInParent()
    if (stop := parameters.pop("stop", None)) is not None:
        request.parameters.stop.values.extend(stop)
        request.parameters.stop.SetInParent()
    request.parameters.MergeFrom(pb.GenerationParameters(**parameters))
    return request
