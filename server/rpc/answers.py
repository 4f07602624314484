"""Answer types as the contract's messages, and back as data."""

from decimal import Decimal
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.answer import AnswerType, Date, Grammar, Json, Label, Number, Regex, Text


def message(answer: AnswerType) -> pb.AnswerType:
    """A type as the contract's message."""
    match answer:
        case Label(labels=labels):
            return pb.AnswerType(label=pb.LabelType(labels=labels))
        case Number(minimum=minimum, maximum=maximum, step=step):
            return pb.AnswerType(number=pb.NumberType(minimum=float(minimum), maximum=float(maximum), step=float(step)))
        case Date(format=format):
            return pb.AnswerType(date=pb.DateType(format=format))
        case Regex(pattern=pattern):
            return pb.AnswerType(regex=pattern)
        case Json(json_schema=schema):
            return pb.AnswerType(json=schema)
        case Grammar(rules=rules):
            return pb.AnswerType(grammar=rules)
        case Text(max_length=max_length):
            return pb.AnswerType(text=pb.TextType(max_length=max_length))


def as_data(answer: pb.AnswerType) -> dict[str, Any]:
    """A message as data for a type; not validated yet."""
    kind = answer.WhichOneof("type")
    value = getattr(answer, kind)
    data: dict[str, Any] = {"type": kind}
    match kind:
        case "label":
            data["labels"] = list(value.labels)
        case "number":
            # Use the double's shortest decimal form, which is the number that the client wrote.
            data |= {name.name: Decimal(repr(number)) for name, number in value.ListFields()}
        case "date":
            data |= {"format": value.format} if value.format else {}
        case "text":
            data["max_length"] = value.max_length
        case _:
            data[{"regex": "pattern", "json": "schema", "grammar": "rules"}[kind]] = value
    return data


def same(own: AnswerType, asked: pb.AnswerType) -> bool:
    """Whether a request's type equals the task's; missing fields have their defaults."""
    if message(own) == asked:
        return True
    data = as_data(asked)
    return all(data.get(name, field.default) == getattr(own, name) for name, field in type(own).model_fields.items())
