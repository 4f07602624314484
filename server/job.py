"""What a valid request asks of the engine, and what the engine gives back. Knows neither gRPC nor vLLM."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mtlora.task import TaskSpec

if TYPE_CHECKING:
    from server.registry.version import AdapterVersion

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class ServedTask:
    """A row of the task table: a task and the adapter version that answers it."""

    spec: TaskSpec
    adapter_name: str
    adapter_version: str
    # vLLM's LoRARequest of the slot.
    slot: Any
    # What must be in the engine for that; None where the slots were put there by hand.
    version: "AdapterVersion | None" = None


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0


@dataclass(frozen=True)
class GenerationJob:
    """A request that has passed validation."""

    task: ServedTask
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    without_adapter: bool = False
    # Requests with different salts share nothing of the prefix cache.
    cache_salt: str | None = None
    # Template prompts are answered without outer blanks; a chat's answer is left as it is.
    strip: bool = True
    include_reasoning: bool = False
    # Tokens that may gather before the engine hands them out; the first one and the last ones never wait.
    delta_tokens: int = 1

    @property
    def answer_marker(self) -> str | None:
        """What parts working from answer; the backbone alone was never taught it."""
        return None if self.without_adapter else self.task.spec.answer_marker


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


@dataclass(frozen=True)
class Delta:
    """What one engine step, or a few, added to a sequence."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    # time.monotonic() when the scheduler first took the sequence; None where the engine keeps no statistics.
    scheduled_at: float | None = None
    # The working, as long as no marker has come; the engine knows nothing of it.
    reasoning: str = ""
