"""JSON schemas without recursion, as expressions.

An answer is JSON. Properties come in the schema's order, with at most one blank after `:` and `,`. Strings escape only
`"`, `\\` and control characters.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from itertools import combinations
from math import isfinite
from typing import Any

from mtlora.answer import language, numbers
from mtlora.answer import regex as regexes
from mtlora.answer.language import MAX_REPEATS, NOTHING, AnswerError, Expression, Repeat, literal, sequence

MAX_CHARACTERS = 64_000
_DEEPEST = 16
_BLANK = language.optional(literal(" "))
_COMMA = sequence(literal(","), _BLANK)
_PLAIN = language.anything_but([(0, 31), (34, 34), (92, 92), (127, 159)])
_ESCAPED = sequence(literal("\\"), language.one_of('"\\/bfnrt'))
_CHARACTER = language.either([_PLAIN, _ESCAPED])
_DECIMALS = Decimal("0.000001")

# Keywords that do not restrict the values.
_NOTES = {
    "title",
    "description",
    "default",
    "examples",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "deprecated",
}
_ALLOWED = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": set(),
    "null": set(),
}
_KINDS = f"{', '.join(_ALLOWED)}, or enum, const, anyOf, $ref"
_FORMATS = {
    "date": lambda: numbers.date("%Y-%m-%d"),
    "time": lambda: regexes.parse(r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d"),
    "email": lambda: regexes.parse(r"[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){1,4}"),
    "uuid": lambda: regexes.parse(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
}


def parse(text: str) -> Expression:
    """The expression of a schema. Raises AnswerError, naming the place in the schema."""
    if len(text) > MAX_CHARACTERS:
        raise AnswerError(f"json: found {len(text)} characters; allowed: {MAX_CHARACTERS}")
    try:
        schema = json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"json: not JSON: {error}") from None
    return _Reader(schema).value(schema, "$", ())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


class _Reader:
    def __init__(self, root: Any) -> None:
        self._root = root
        # Expressions by reference: several references to one definition share its expression.
        self._read: dict[str, Expression] = {}

    def value(self, schema: Any, place: str, inside: tuple[str, ...]) -> Expression:
        """The values that a schema allows. `inside`: the references being followed; finds recursion."""
        if not isinstance(schema, Mapping):
            raise _wrong(place, f"found {_shown(schema)}; allowed: an object with a type")
        if place.count(".") + place.count("[") > _DEEPEST:
            raise _wrong(place, f"nested deeper than {_DEEPEST}")
        words = set(schema) - _NOTES
        if "$ref" in words:
            return self._reference(schema["$ref"], words, place, inside)
        if "const" in words:
            self._only(words, {"const", "type"}, place)
            return language.choice([_dump(value) for value in self._listed([schema["const"]], schema, place)])
        if "enum" in words:
            self._only(words, {"enum", "type"}, place)
            if not isinstance(schema["enum"], list) or not schema["enum"]:
                raise _wrong(place, "enum: allowed: a list of at least one value")
            return language.choice([_dump(value) for value in self._listed(schema["enum"], schema, place)])
        for word in ("anyOf", "oneOf"):
            if word in words:
                self._only(words, {word}, place)
                if not isinstance(schema[word], list) or not schema[word]:
                    raise _wrong(place, f"{word}: allowed: a list of at least one schema")
                options = [self.value(each, f"{place}.{word}[{i}]", inside) for i, each in enumerate(schema[word])]
                if word == "oneOf":
                    self._refuse_overlaps(schema[word], place)
                return language.either(options)
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            own = {word for one in kind if isinstance(one, str) for word in _ALLOWED.get(one, set())}
            self._only(words, {"type", *own}, place)
            return language.either(
                self.value(
                    {word: schema[word] for word in words & _ALLOWED.get(str(one), set())} | {"type": one},
                    place,
                    inside,
                )
                for one in kind
            )
        if not isinstance(kind, str) or kind not in _ALLOWED:
            raise _wrong(place, f"type: found {_shown(kind)}; allowed: {_KINDS}")
        self._only(words, {"type", *_ALLOWED[kind]}, place)
        match kind:
            case "object":
                return self._object(schema, place, inside)
            case "array":
                return self._array(schema, place, inside)
            case "string":
                return self._string(schema, place)
            case "boolean":
                return language.choice(["true", "false"])
            case "null":
                return literal("null")
        return self._number(schema, place, Decimal(1) if kind == "integer" else _DECIMALS)

    def _only(self, words: set[str], allowed: set[str], place: str) -> None:
        if unknown := sorted(words - allowed):
            raise _wrong(place, f"found {unknown[0]!r}; allowed here: {', '.join(sorted(allowed))}")

    def _listed(self, values: list[Any], schema: Mapping[str, Any], place: str) -> list[Any]:
        """The listed values, without those that the schema's `type` excludes."""
        if "type" not in schema:
            return values
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if wrong := [kind for kind in kinds if not isinstance(kind, str) or kind not in _ALLOWED]:
            raise _wrong(place, f"type: found {_shown(wrong[0])}; allowed: {', '.join(_ALLOWED)}")
        found = [value for value in values if any(_is_of(value, kind) for kind in kinds)]
        if not found:
            raise _wrong(place, f"no value is of type {', '.join(kinds)}")
        return found

    def _refuse_overlaps(self, options: list[Any], place: str) -> None:
        """Raise AnswerError if oneOf's options may share a value; knows only simple disjoint cases."""
        for one, other in combinations(map(self._told_apart_by, options), 2):
            values = one[1] is not None and other[1] is not None and not any(each in other[1] for each in one[1])
            if one[0] & other[0] and not values:
                raise _wrong(place, "oneOf: allowed: options of different types, or values; anyOf takes any options")

    def _told_apart_by(self, schema: Any) -> tuple[set[str], list[Any] | None]:
        """A schema's types, and its values if they are listed. `value` has validated the schema."""
        if "$ref" in schema:
            return self._told_apart_by(self._found(schema["$ref"], ""))
        if "const" in schema or "enum" in schema:
            listed = schema["enum"] if "enum" in schema else [schema["const"]]
            listed = self._listed(listed, schema, "")
            return {kind for each in listed for kind in _ALLOWED if _is_of(each, kind)}, listed
        if inner := schema.get("anyOf", schema.get("oneOf")):
            return set().union(*(self._told_apart_by(each)[0] for each in inner)), None
        kinds = set(schema["type"] if isinstance(schema["type"], list) else [schema["type"]])
        return kinds | ({"integer"} if "number" in kinds else set()), None

    def _reference(self, target: Any, words: set[str], place: str, inside: tuple[str, ...]) -> Expression:
        self._only(words, {"$ref"}, place)
        if not isinstance(target, str):
            raise _wrong(place, f"$ref: found {_shown(target)}; allowed: a place in this schema, such as #/$defs/name")
        if target in inside:
            raise _wrong(place, f"recurses through {target}")
        if target not in self._read:
            self._read[target] = self.value(self._found(target, place), place, (*inside, target))
        return self._read[target]

    def _found(self, target: str, place: str) -> Any:
        """The schema that a reference names."""
        found = self._root
        if not target.startswith("#/"):
            raise _wrong(place, f"$ref: found {_shown(target)}; allowed: a place in this schema, such as #/$defs/name")
        for name in target[2:].split("/"):
            name = name.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or name not in found:
                raise _wrong(place, f"$ref: the schema has no {target}")
            found = found[name]
        return found

    def _object(self, schema: Mapping[str, Any], place: str, inside: tuple[str, ...]) -> Expression:
        if "properties" not in schema:
            raise _wrong(place, "an object needs properties")
        properties, required = schema["properties"], schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise _wrong(place, "properties must be an object, and required a list")
        if unknown := [name for name in required if name not in properties]:
            raise _wrong(place, f"required: found {_shown(unknown[0])}, which is no property")
        if schema.get("additionalProperties", False) is not False:
            raise _wrong(place, "additionalProperties: allowed: false (an answer never has any)")
        members = [
            sequence(literal(_dump(name)), literal(":"), _BLANK, self.value(each, f"{place}.{name}", inside))
            for name, each in properties.items()
        ]
        needed = [name in required for name in properties]
        if not any(needed):
            options = [
                sequence(member, *(language.optional(sequence(_COMMA, each)) for each in members[i + 1 :]))
                for i, member in enumerate(members)
            ]
            return sequence(literal("{"), language.either([*options, NOTHING]), literal("}"))
        first = needed.index(True)
        before = (language.optional(sequence(member, _COMMA)) for member in members[:first])
        after = (
            sequence(_COMMA, member) if always else language.optional(sequence(_COMMA, member))
            for member, always in zip(members[first + 1 :], needed[first + 1 :], strict=True)
        )
        return sequence(literal("{"), *before, members[first], *after, literal("}"))

    def _array(self, schema: Mapping[str, Any], place: str, inside: tuple[str, ...]) -> Expression:
        if "items" not in schema:
            raise _wrong(place, "an array needs items")
        item = self.value(schema["items"], f"{place}[]", inside)
        least, most = self._counts(schema, "minItems", "maxItems", place)
        if most == 0:
            return literal("[]")
        further = Repeat(sequence(_COMMA, item), max(0, least - 1), None if most is None else most - 1)
        items = sequence(item, further)
        return sequence(literal("["), items if least else language.optional(items), literal("]"))

    def _string(self, schema: Mapping[str, Any], place: str) -> Expression:
        least, most = self._counts(schema, "minLength", "maxLength", place)
        sized = "minLength" in schema or "maxLength" in schema
        if sum(("pattern" in schema, "format" in schema, sized)) > 1:
            raise _wrong(place, "allowed: one of a length, pattern, format")
        if "pattern" in schema:
            pattern = schema["pattern"]
            if not isinstance(pattern, str) or not (pattern.startswith("^") and pattern.endswith("$")):
                raise _wrong(place, f"pattern: found {_shown(pattern)}; allowed: one for the whole string, ^...$")
            return sequence(literal('"'), _spelt(regexes.parse(pattern), place), literal('"'))
        if "format" in schema:
            if schema["format"] not in _FORMATS:
                raise _wrong(place, f"format: found {_shown(schema['format'])}; allowed: {', '.join(_FORMATS)}")
            return sequence(literal('"'), _FORMATS[schema["format"]](), literal('"'))
        return sequence(literal('"'), Repeat(_CHARACTER, least, most), literal('"'))

    def _number(self, schema: Mapping[str, Any], place: str, step: Decimal) -> Expression:
        def limit(name: str, otherwise: Decimal) -> Decimal:
            value = schema.get(name, otherwise)
            if isinstance(value, bool) or not isinstance(value, int | Decimal):
                raise _wrong(place, f"{name}: found {_shown(value)}; allowed: a number")
            return Decimal(value)

        unit = limit("multipleOf", step)
        if step == 1 and unit % 1:
            raise _wrong(place, f"multipleOf: found {unit}; allowed: a whole number")
        low, high = limit("minimum", -numbers.WIDEST), limit("maximum", numbers.WIDEST)
        if "exclusiveMinimum" in schema:
            low = max(low, limit("exclusiveMinimum", low) + unit.scaleb(-1))
        if "exclusiveMaximum" in schema:
            high = min(high, limit("exclusiveMaximum", high) - unit.scaleb(-1))
        try:
            return numbers.number(low, high, unit)
        except AnswerError as error:
            raise _wrong(place, str(error)) from None

    def _counts(self, schema: Mapping[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
        for name in (least, most):
            value = schema.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEATS:
                raise _wrong(place, f"{name}: found {_shown(value)}; allowed: 0 to {MAX_REPEATS}")
        bounds = schema.get(least, 0), schema.get(most)
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise _wrong(place, f"{least} is above {most}")
        return bounds


def _spelt(expression: Expression, place: str) -> Expression:
    """A pattern inside a JSON string. Raises AnswerError if a match would need an escape."""
    automaton = language.Automaton(expression)
    for char in ('"', "\\", *map(chr, range(32))):
        if automaton.may_contain(char):
            raise _wrong(place, f"pattern: may match {char!r}; allowed: characters that JSON does not escape")
    return expression


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_decimal)
    except TypeError as error:
        raise AnswerError(f"json: {error}") from None


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value has a type by JSON Schema's rules: 1.0 is an integer."""
    match value:
        case bool():
            return kind == "boolean"
        case None:
            return kind == "null"
        case int():
            return kind in ("integer", "number")
        case Decimal():
            return kind == "number" or (kind == "integer" and value % 1 == 0)
        case str():
            return kind == "string"
        case list():
            return kind == "array"
    return kind == "object"


def _decimal(value: Any) -> float:
    if isinstance(value, Decimal):
        if not isfinite(found := float(value)):
            raise AnswerError(f"json: found {value}; allowed: numbers that a double holds")
        return found
    raise TypeError(f"{value!r} is not JSON")


def _shown(value: Any) -> str:
    return repr(value)[:48]


def _wrong(place: str, what: str) -> AnswerError:
    return AnswerError(f"json: {place[:200]}: {what}")
