"""What a valid request asks of the engine, and what the engine returns. Knows neither gRPC nor vLLM.

Nothing changes them once they are made. Classes of which each request or token makes one are not frozen: a frozen one
takes eight times as long to make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Literal

from mtlora.task import TaskSpec

FinishReason = Literal["stop", "length"]

# Tokens whose log-probabilities the engine gives at a time: the labels that Score tells apart.
MAX_SCORED_TOKENS = 1001


class Lane(IntEnum):
    """The engine that a request waits for. Requests for one engine take no places of the other's."""

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
    # Whether its adapter acts on all tokens, or from the task's own part of the prompt on.
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
    # What the answer is held to, as the engine reads it; see mtlora.answer.constraint.
    constraint: str | None = None
    # Whether a stop string may occur all the same: a constraint lets none of the task's own occur.
    stops_occur: bool = False
    more: MoreSampling | None = None


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """An image in a prompt, as the language backbone reads it: rows [S, D] of its embeddings, from position `at` on."""

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
    # Tokens that may gather before the engine hands them out. An answer that fits comes in one piece; in a longer one,
    # the first token and the last ones never wait.
    delta_tokens: int = 1
    # The name of the type that its answer is held to.
    answer_type: str = ""
    # A further sequence for an input that was counted already.
    further: bool = False
    # Samples to answer with, and samples to draw.
    n: int = 1
    best_of: int = 1
    return_token_ids: bool = False
    # Order among the tenant's own waiting requests, higher first.
    priority: int = 0
    # Prompt tokens before the adapter acts; None if it acts on all.
    activation: int | None = None
    # (seconds, most tokens of the tenant): how long the engine keeps the blocks before `activation`, and of how many.
    lease: tuple[float, int] | None = None
    # Prompt tokens that another request of the same call computes.
    shared: int = 0
    # Soft tokens of the prompt's image, once the engine has looked at it.
    soft: SoftTokens | None = None

    lane: ClassVar = Lane.TEXT
    # The cost of a prompt token, as the fair queue counts it.
    position_cost: ClassVar[float] = 1.0


@dataclass(frozen=True)
class ImageJob:
    """An image that a task is asked about, before it is decoded.

    prompt_ids: the positions of its sequence in the engine, in place of tokens. position_cost: what one costs, in
    prompt tokens of the language backbone.
    """

    task: ServedTask
    prompt_ids: range
    position_cost: float

    lane: ClassVar = Lane.IMAGES
    # A tenant's images run in the order in which they came.
    priority: ClassVar = 0
    # Every position is computed.
    shared: ClassVar = 0
    # The positions' own step gives the label: the answer has no tokens.
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
    # The working, until the marker comes. `Generation` sets it; the engine does not know the marker.
    reasoning: str = ""
