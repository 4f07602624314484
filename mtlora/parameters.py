"""Generation parameters: limits, contradictions between them, and a task's default values."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_SAMPLES: Final = 16
MAX_TEMPERATURE: Final = 2.0
# Most alternative tokens reported per token of an answer or a prompt.
MAX_LOGPROBS: Final = 20
MAX_PENALTY: Final = 2.0
# Bounds of a positive temperature: beyond them, logits would leave the range of float32.
REPETITION_PENALTIES: Final = (0.01, 10.0)
MAX_BIAS: Final = 100.0
# Most token ids in one list: the engine goes through all of them in every step.
MAX_LISTED: Final = 1024
MAX_STOP_TOKENS: Final = 64
MAX_PRIORITY: Final = 100
# Parameters that contradict a type of answer.
AGAINST_TYPES: Final = ("allowed_tokens", "banned_tokens", "stop_token_ids", "min_new_tokens")

_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
_Tokens = Annotated[tuple[_TokenId, ...], Field(max_length=MAX_LISTED)]
_Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
_Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
_Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class TaskDefaults(BaseModel):
    """A task's default values; names as in the contract's GenerationParameters; None means the server's default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=1 << 32)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    logprobs: _Logprobs | None = None
    n: _Samples | None = None
    best_of: _Samples | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1])
    logit_bias: dict[_TokenId, Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]] | None = Field(
        None, max_length=MAX_LISTED
    )
    allowed_tokens: _Tokens | None = None
    banned_tokens: _Tokens | None = None
    stop_token_ids: Annotated[tuple[_TokenId, ...], Field(max_length=MAX_STOP_TOKENS)] | None = None
    min_new_tokens: int | None = Field(None, ge=0, le=4096)
    prompt_logprobs: _Logprobs | None = None
    return_token_ids: bool | None = None
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)

    @model_validator(mode="after")
    def _consistent(self) -> "TaskDefaults":
        for name, reason in contradictions(self.given):
            raise ValueError(f"{name}: {reason}")
        return self

    @cached_property
    def given(self) -> Mapping[str, Any]:
        """The values that are set, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @property
    def largest_token(self) -> int:
        """The largest token id that the values name; -1 if they name none."""
        listed = (self.allowed_tokens, self.banned_tokens, self.stop_token_ids, self.logit_bias)
        return max((token for tokens in listed for token in tokens or ()), default=-1)


def samples(values: Mapping[str, Any]) -> tuple[int, int]:
    """(n, best_of) that values ask for."""
    n = values.get("n", 1)
    return n, values.get("best_of", n)


def contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(parameter, reason) of each value that contradicts another one; each value alone must be within its limits."""
    n, best_of = samples(values)
    if best_of < n:
        yield "best_of", f"found {best_of}; allowed: n, {n}, or more"
    if best_of > 1 and not values.get("temperature"):
        name = "n" if n > 1 else "best_of"
        yield name, f"found {values[name]} at temperature 0, where all samples are equal; allowed: 1"
    banned = set(values.get("banned_tokens", ()))
    if both := sorted(banned.intersection(values.get("allowed_tokens", ()))):
        yield "allowed_tokens", f"found {both[0]}, which banned_tokens has too; allowed: each in one of the two"
