"""Converts request parameters of the Open Inference Protocol to the native contract."""

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from mtlora_pb.v1 import inference_pb2 as native
from openinference_pb import grpc_predict_v2_pb2 as pb

from server.errors import Violation

_NUMBERS = (
    "max_tokens", "temperature", "top_p", "top_k", "seed", "best_of", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "priority",
)  # fmt: skip
# Names that GenerationParameters spells otherwise.
_FIELDS = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
# KServe's Python client refuses floats, so its users send strings.
_INTEGERS = ("int64_param", "uint64_param", "string_param")
# What a field of a type takes: kinds of value, conversion, what is allowed.
_TYPES: Mapping[int, tuple[tuple[str, ...], type[int] | type[float], str]] = {
    FieldDescriptor.TYPE_UINT32: (_INTEGERS, int, "0 to 4294967295"),
    FieldDescriptor.TYPE_UINT64: (_INTEGERS, int, "0 to 18446744073709551615"),
    FieldDescriptor.TYPE_INT32: (_INTEGERS, int, "-2147483648 to 2147483647"),
    FieldDescriptor.TYPE_FLOAT: ((*_INTEGERS, "double_param"), float, "a number"),
}
_LISTS = ("allowed_tokens", "banned_tokens", "stop_token_ids")
_STRINGS = ("stop", "logit_bias", *_LISTS)
_FLAGS = ("without_adapter", "free")
ALLOWED = (*_NUMBERS, *_STRINGS, *_FLAGS)
# Parameters allowed with scores; others would not apply, because the working is greedy and probabilities are the
# model's own.
SCORED = ("max_tokens", "priority", "without_adapter")


def apply(
    given: Mapping[str, pb.InferParameter], request: native.GenerateRequest, *, scored: bool = False
) -> Iterator[Violation]:
    """Set the parameters in `request`; yields violations. scored: whether the requested outputs are scores."""
    for name in sorted(given):
        kind = given[name].WhichOneof("parameter_choice")
        value: Any = getattr(given[name], kind) if kind else None
        if scored and name not in SCORED:
            wrong: str | None = f"found beside an output that is scored; allowed: {', '.join(SCORED)}"
        elif name in _NUMBERS:
            wrong = _set_number(request.parameters, _FIELDS.get(name, name), kind, value)
        elif name in _STRINGS:
            wrong = _set_list(request.parameters, name, kind, value)
        elif name in _FLAGS:
            wrong = _set_flag(request, name, kind, value)
        else:
            wrong = f"unknown; allowed: {', '.join(ALLOWED)}"
        if wrong:
            yield Violation(f"parameters[{name[:32]}]", wrong)


def _set_number(parameters: native.GenerationParameters, field: str, kind: str | None, value: Any) -> str | None:
    """Set a number; returns what is wrong with it."""
    kinds, convert, allowed = _TYPES[parameters.DESCRIPTOR.fields_by_name[field].type]
    if kind not in kinds:
        return f"found {kind}; allowed: {', '.join(kinds)}"
    try:
        setattr(parameters, field, convert(value))
    except ValueError:
        return f"found {str(value)[:32]!r}; allowed: {allowed}"
    return None


def _set_list(parameters: native.GenerationParameters, name: str, kind: str | None, value: Any) -> str | None:
    """Set a stop string, or numbers with commas; returns what is wrong.

    An empty string means an empty list, which removes the task's own values.
    """
    if kind != "string_param":
        return f"found {kind}; allowed: string_param"
    message = getattr(parameters, name)
    message.SetInParent()
    if name == "stop":
        message.values.extend([value] if value else [])
        return None
    parts, allowed = [each for each in value.split(",") if each.strip()], "token ids, such as 5, 17"
    try:
        if name == "logit_bias":
            allowed = "token ids and biases, such as 5:-1.5, 17:2"
            message.values.update({int(token): float(bias) for token, bias in (each.split(":") for each in parts)})
        else:
            message.values.extend(map(int, parts))
    except ValueError:
        return f"found {value[:32]!r}; allowed: {allowed}"
    return None


def _set_flag(request: native.GenerateRequest, name: str, kind: str | None, value: Any) -> str | None:
    """Set a flag; returns what is wrong with it."""
    if kind != "bool_param":
        return f"found {kind}; allowed: bool_param"
    setattr(request, name, value)
    return None
