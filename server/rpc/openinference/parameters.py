"""Request parameters of the Open Inference Protocol to those of the native contract."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mtlora_pb.v1 import inference_pb2 as native
from openinference_pb import grpc_predict_v2_pb2 as pb

from server.errors import Violation

# KServe's Python client can send no float but as a string.
_INTEGERS = ("int64_param", "uint64_param", "string_param")
_NUMBERS = (*_INTEGERS, "double_param")


def _integer(below: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError("a whole number") from None
        if not 0 <= number < below:
            raise ValueError(f"0 to {below - 1}")
        return number

    return convert


def _number(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number") from None


# Name -> (field of GenerationParameters, kinds of value, conversion).
_FIELDS: dict[str, tuple[str, tuple[str, ...], Callable[[Any], Any]]] = {
    "max_tokens": ("max_new_tokens", _INTEGERS, _integer(1 << 32)),
    "temperature": ("temperature", _NUMBERS, _number),
    "top_p": ("top_p", _NUMBERS, _number),
    "top_k": ("top_k", _INTEGERS, _integer(1 << 32)),
    "seed": ("seed", _INTEGERS, _integer(1 << 64)),
}
ALLOWED = (*_FIELDS, "stop", "without_adapter")


def apply(given: Mapping[str, pb.InferParameter], request: native.GenerateRequest) -> Iterator[Violation]:
    """Set the parameters in `request`; yields what is wrong with them."""
    for name in sorted(given):
        where, kind = f"parameters[{name[:32]}]", given[name].WhichOneof("parameter_choice")
        value = getattr(given[name], kind) if kind else None
        if name in _FIELDS:
            field, kinds, convert = _FIELDS[name]
            if kind not in kinds:
                yield Violation(where, f"found {kind}; allowed: {', '.join(kinds)}")
                continue
            try:
                setattr(request.parameters, field, convert(value))
            except ValueError as error:
                yield Violation(where, f"found {str(value)[:32]!r}; allowed: {error}")
        elif name == "stop" and kind == "string_param":
            # An empty one takes the task's own stop strings away.
            request.parameters.stop.values.extend([value] if value else [])
            request.parameters.stop.SetInParent()
        elif name == "without_adapter" and kind == "bool_param":
            request.without_adapter = bool(value)
        elif name in ALLOWED:
            yield Violation(where, f"found {kind}; allowed: {'string' if name == 'stop' else 'bool'}_param")
        else:
            yield Violation(where, f"unknown; allowed: {', '.join(ALLOWED)}")
