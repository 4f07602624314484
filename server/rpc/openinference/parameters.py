"""Converts request parameters of the Open Inference Protocol to the native contract."""

from collections.abc import Iterator, Mapping
from typing import Any

from mtlora_pb.v1 import inference_pb2 as native
from openinference_pb import grpc_predict_v2_pb2 as pb

from server.errors import Violation

# KServe's Python client refuses floats, so its users send strings.
_INTEGERS = ("int64_param", "uint64_param", "string_param")
_NUMBERS = (*_INTEGERS, "double_param")


# Name -> (field of GenerationParameters, whose type bounds the value; kinds of value; conversion; what is allowed).
_FIELDS: dict[str, tuple[str, tuple[str, ...], type[int] | type[float], str]] = {
    "max_tokens": ("max_new_tokens", _INTEGERS, int, "0 to 4294967295"),
    "temperature": ("temperature", _NUMBERS, float, "a number"),
    "top_p": ("top_p", _NUMBERS, float, "a number"),
    "top_k": ("top_k", _INTEGERS, int, "0 to 4294967295"),
    "seed": ("seed", _INTEGERS, int, "0 to 18446744073709551615"),
    "best_of": ("best_of", _INTEGERS, int, "0 to 4294967295"),
    "min_p": ("min_p", _NUMBERS, float, "a number"),
    "presence_penalty": ("presence_penalty", _NUMBERS, float, "a number"),
    "frequency_penalty": ("frequency_penalty", _NUMBERS, float, "a number"),
    "repetition_penalty": ("repetition_penalty", _NUMBERS, float, "a number"),
    "min_tokens": ("min_new_tokens", _INTEGERS, int, "0 to 4294967295"),
    "priority": ("priority", _INTEGERS, int, "-2147483648 to 2147483647"),
}
_LISTS = ("allowed_tokens", "banned_tokens", "stop_token_ids")
_STRINGS = ("stop", "logit_bias", *_LISTS)
_FLAGS = ("without_adapter", "free")
ALLOWED = (*_FIELDS, *_STRINGS, *_FLAGS)
# Parameters allowed with scores; others would not apply, because the working is greedy and probabilities are the
# model's own.
SCORED = ("max_tokens", "priority", "without_adapter")
_EXAMPLES = {"logit_bias": "token ids and biases, such as 5:-1.5, 17:2", "": "token ids, such as 5, 17"}


def apply(
    given: Mapping[str, pb.InferParameter], request: native.GenerateRequest, *, scored: bool = False
) -> Iterator[Violation]:
    """Set the parameters in `request`; yields violations. scored: whether the requested outputs are scores."""
    for name in sorted(given):
        where, kind = f"parameters[{name[:32]}]", given[name].WhichOneof("parameter_choice")
        value: Any = getattr(given[name], kind) if kind else None
        if scored and name not in SCORED:
            yield Violation(where, f"found beside an output that is scored; allowed: {', '.join(SCORED)}")
        elif name in _FIELDS:
            field, kinds, convert, allowed = _FIELDS[name]
            if kind not in kinds:
                yield Violation(where, f"found {kind}; allowed: {', '.join(kinds)}")
                continue
            try:
                setattr(request.parameters, field, convert(value))
            except ValueError:
                yield Violation(where, f"found {str(value)[:32]!r}; allowed: {allowed}")
        elif name in _STRINGS and kind == "string_param":
            # An empty string means an empty list, which removes the task's own values.
            message = getattr(request.parameters, name)
            message.SetInParent()
            try:
                if name == "logit_bias":
                    biases = [each.split(":") for each in value.split(",") if each.strip()]
                    message.values.update({int(token): float(bias) for token, bias in biases})
                elif name in _LISTS:
                    message.values.extend(int(each) for each in value.split(",") if each.strip())
                elif value:
                    message.values.append(value)
            except ValueError:
                yield Violation(where, f"found {value[:32]!r}; allowed: {_EXAMPLES.get(name, _EXAMPLES[''])}")
        elif name in _FLAGS and kind == "bool_param":
            setattr(request, name, value)
        elif name in ALLOWED:
            yield Violation(where, f"found {kind}; allowed: {'string' if name in _STRINGS else 'bool'}_param")
        else:
            yield Violation(where, f"unknown; allowed: {', '.join(ALLOWED)}")
