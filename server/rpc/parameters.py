"""Parameters that few requests set: each within its limits, and all of them together with the task's own."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.parameters import (
    MAX_BIAS,
    MAX_LISTED,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_PRIORITY,
    MAX_SAMPLES,
    MAX_STOP_TOKENS,
    REPETITION_PENALTIES,
    TaskDefaults,
    contradictions,
    samples,
)
from server.errors import Violation
from server.job import MoreSampling

# Most logits of a prompt's tokens for one request: 128 MiB, and for a moment three times that.
_MAX_PROMPT_LOGITS = 1 << 25
_LISTS = ("allowed_tokens", "banned_tokens", "stop_token_ids")
# Name -> (minimum, maximum), inclusive. Comparisons are written so that they refuse NaN.
_RANGES: Mapping[str, tuple[float, float]] = {
    "n": (1, MAX_SAMPLES),
    "best_of": (1, MAX_SAMPLES),
    "min_p": (0, 1),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "repetition_penalty": REPETITION_PENALTIES,
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "priority": (-MAX_PRIORITY, MAX_PRIORITY),
}
_MORE = frozenset(MoreSampling.__dataclass_fields__)


def values_of(parameters: pb.GenerationParameters, defaults: TaskDefaults | None, *, stream: bool) -> dict[str, Any]:
    """A request's values in Python types, over its task's values; without stop strings."""
    given: dict[str, Any] = {}
    for field, value in parameters.ListFields():
        if field.name in _LISTS:
            given[field.name] = tuple(value.values)
        elif field.name == "logit_bias":
            given[field.name] = dict(value.values)
        elif field.name != "stop":
            given[field.name] = value
    values = {**defaults.given, **given} if defaults else given
    if stream or "n" in given:
        # Ignore the task's numbers of samples in streams, and raise its best_of to the request's n.
        for name in {"n", "best_of"} - given.keys():
            if name in values:
                values[name] = 1 if stream else max(values["n"], values[name])
    return values


def violations(
    values: Mapping[str, Any], vocab_size: int, end_tokens: Set[int], *, stream: bool
) -> Iterator[Violation]:
    """Violations of the request's or its task's values."""
    wrong = [
        *_out_of_range(values),
        *(each for name in _LISTS for each in _wrong_tokens(name, values.get(name, ()), vocab_size)),
        *_wrong_biases(values.get("logit_bias", {}), vocab_size),
    ]
    yield from wrong
    if not wrong:
        yield from (Violation(f"parameters.{name}", reason) for name, reason in contradictions(values))
        yield from _nothing_left(values, vocab_size, end_tokens)
        n, best_of = samples(values)
        if stream and (n > 1 or best_of > 1):
            name = "n" if n > 1 else "best_of"
            yield Violation(
                f"parameters.{name}", f"found {values[name]}; allowed: 1 in a stream, which gives one answer"
            )


def prompt_violation(values: Mapping[str, Any], prompt_tokens: int, vocab_size: int) -> Violation | None:
    """A prompt too long for log-probabilities of its tokens: the engine computes all of their logits at once."""
    most = _MAX_PROMPT_LOGITS // vocab_size
    if not values.get("prompt_logprobs") or prompt_tokens <= most:
        return None
    return Violation("parameters.prompt_logprobs", f"found a prompt of {prompt_tokens} tokens; allowed: up to {most}")


def more_sampling(values: Mapping[str, Any]) -> MoreSampling:
    """Convert valid values for the engine."""
    n, best_of = samples(values)
    given = {name: value for name, value in values.items() if name in _MORE}
    return MoreSampling(**given, cumulative_logprob=best_of > n or bool(values.get("logprobs")))


def _out_of_range(values: Mapping[str, Any]) -> Iterator[Violation]:
    for name, (least, most) in _RANGES.items():
        if name in values and not least <= values[name] <= most:
            yield Violation(f"parameters.{name}", f"found {values[name]:g}; allowed: {least:g} to {most:g}")


def _wrong_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> Iterator[Violation]:
    where, most = f"parameters.{name}.values", MAX_STOP_TOKENS if name == "stop_token_ids" else MAX_LISTED
    if len(tokens) > most:
        yield Violation(where, f"found {len(tokens)}; allowed: up to {most}")
        return
    for index, token in enumerate(tokens):
        if token >= vocab_size:
            yield no_token(f"{where}[{index}]", token, vocab_size)


def _wrong_biases(biases: Mapping[int, float], vocab_size: int) -> Iterator[Violation]:
    where = "parameters.logit_bias.values"
    if len(biases) > MAX_LISTED:
        yield Violation(where, f"found {len(biases)}; allowed: up to {MAX_LISTED}")
        return
    for token, bias in sorted(biases.items()):
        if token >= vocab_size:
            yield no_token(f"{where}[{token}]", token, vocab_size)
        elif not -MAX_BIAS <= bias <= MAX_BIAS:
            yield Violation(f"{where}[{token}]", f"found {bias:g}; allowed: {-MAX_BIAS:g} to {MAX_BIAS:g}")


def no_token(where: str, token: int, vocab_size: int) -> Violation:
    """The violation of an id that is not in the vocabulary."""
    return Violation(where, f"found {token}, which is no token; allowed: 0 to {vocab_size - 1}")


def _nothing_left(values: Mapping[str, Any], vocab_size: int, end_tokens: Set[int]) -> Iterator[Violation]:
    banned = set(values.get("banned_tokens", ()))
    # The engine supports this many changed logits per sequence.
    if (changed := len(banned | values.get("logit_bias", {}).keys())) > MAX_LISTED:
        yield Violation(
            "parameters.logit_bias.values",
            f"found {changed} tokens together with banned_tokens; allowed: up to {MAX_LISTED}",
        )
    allowed, ends = set(values.get("allowed_tokens", ())), end_tokens | {*values.get("stop_token_ids", ())}
    if len(banned) >= vocab_size:
        yield Violation("parameters.banned_tokens.values", "found every token; allowed: fewer")
    elif values.get("min_new_tokens") and (allowed <= ends if allowed else len(banned | ends) >= vocab_size):
        yield Violation(
            "parameters.min_new_tokens",
            f"found {values['min_new_tokens']}, where every allowed token ends the answer; allowed: 0",
        )
