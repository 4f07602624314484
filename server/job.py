"""Data classes for valid requests to the engine and for its results. Does not depend on gRPC or vLLM.

Treat all of them as immutable. Classes made per request or token are not frozen, because a frozen one takes eight times
as long to make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal

from mtlora.task import TaskSpec

FinishReason = Literal["stop", "length"]

# Most tokens whose log-probabilities the engine returns at once: a limit for Score's labels.
MAX_SCORED_TOKENS = 1001


class Lane(IntEnum):
    """The engine that a request waits for. Each engine has its own turns and places."""

    TEXT = 0
    IMAGES = 1


@dataclass(frozen=True)
class ServedTask:
    """A row of the task table: a task and the adapter version that answers it."""

    spec: TaskSpec
    adapter_name: str
    adapter_version: str
    # vLLM's LoRARequest of the slot.
    slot: Any
    # The registry's adapter version, which the engine must hold meanwhile; None if the slot needs none.
    version: Any = None
    # The temperature of the probabilities of its labels.
    calibration: float | None = None
    # Whether its adapter acts on all tokens, or only from the task's own part of the prompt on.
    activation: Literal["all", "task"] = "all"

    @property
    def lane(self) -> Lane:
        return Lane.TEXT if self.spec.image is None else Lane.IMAGES


@dataclass(frozen=True)
class MoreSampling:
    """Sampling parameters that few requests set; see the contract's GenerationParameters."""

    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    prompt_logprobs: int = 0
    # Also sum up the log-probabilities of the generated tokens.
    cumulative_logprob: bool = False


@dataclass(slots=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    # The answer's constraint in the engine's form; see mtlora.answer.constraint.
    constraint: str | None = None
    # Whether a stop string may still occur: a constraint excludes the task's own stop strings.
    stops_occur: bool = False
    more: MoreSampling | None = None


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """An image in a prompt: input embeddings [S, D] of the language backbone, from position `at` on."""

    at: int
    rows_SD: Any


@dataclass(slots=True)
class GenerationJob:
    """A request that has passed validation; one of its samples, if there are several."""

    task: ServedTask
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    without_adapter: bool = False
    # Requests with different salts share no blocks of the prefix cache.
    cache_salt: str | None = None
    # Answers to template prompts lose their outer blanks; a chat's answer keeps them.
    strip: bool = True
    include_reasoning: bool = False
    # Most tokens that the engine collects before it returns them. A shorter answer comes in one piece; of a longer one,
    # the first token and the last ones are returned at once.
    delta_tokens: int = 1
    # The name of the answer's type.
    answer_type: str = ""
    # Whether this is a further sequence for an input that was already counted.
    further: bool = False
    # Number of samples to return, and to draw.
    n: int = 1
    best_of: int = 1
    return_token_ids: bool = False
    # Priority among the tenant's own waiting requests; higher first.
    priority: int = 0
    # Prompt tokens before the adapter acts; None if it acts on all.
    activation: int | None = None
    # (seconds, most tokens of the tenant): how long the engine keeps the blocks before `activation`, and of how many.
    lease: tuple[float, int] | None = None
    # Prompt tokens that another request of the same call already computes.
    shared: int = 0
    # Soft tokens of the prompt's image, once the engine has looked at it.
    soft: SoftTokens | None = None

    lane: ClassVar = Lane.TEXT
    # The fair queue's cost of a prompt token.
    position_cost: ClassVar[float] = 1.0


@dataclass(frozen=True)
class ImageJob:
    """One image for one task, before it is decoded.

    prompt_ids: one entry per position of its sequence in the engine, instead of tokens. position_cost: what one costs,
    in prompt tokens of the language backbone.
    """

    task: ServedTask
    prompt_ids: range
    position_cost: float

    lane: ClassVar = Lane.IMAGES
    # A tenant's images run in order of arrival.
    priority: ClassVar = 0
    # Nothing is cached.
    shared: ClassVar = 0
    # No token is generated: the label follows from the prefill step.
    sampling: ClassVar[None] = None


Job = GenerationJob | ImageJob


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """One generated token and the most likely ones in its place, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(slots=True)
class Delta:
    """What one or more engine steps added to a sequence."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    # time.monotonic() when the engine's scheduler first took the sequence, and when its first token came; None if the
    # engine keeps no statistics.
    scheduled_at: float | None = None
    first_token_at: float | None = None
    # Prompt tokens found in the prefix cache.
    cached_tokens: int = 0
    token_ids: Sequence[int] = ()
    # Log-probabilities of all prompt tokens but the first, in the first delta.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    # Sum over all tokens so far; None unless asked for.
    cumulative_logprob: float | None = None
    # Text of the working, up to the marker. `Generation` sets it, because the engine does not know the marker.
    reasoning: str = ""
