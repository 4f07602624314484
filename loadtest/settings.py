"""What a run is asked to do: every setting that the result must carry, checked when it is made."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtest.errors import LoadTestError
from mtlora.errors import describe

_MIX = re.compile(r"uniform|zipf(:\d+(\.\d+)?)?|hot:[^=]+(=\d*\.?\d+)?")


def _check_mix(text: str) -> str:
    if not _MIX.fullmatch(text):
        raise ValueError("allowed: uniform, zipf, zipf:EXPONENT, hot:NAME, hot:NAME=SHARE")
    return text


Mix = Annotated[str, AfterValidator(_check_mix)]
Model = TypeVar("Model", bound=BaseModel)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Frozen):
    """Whole numbers from `low` to `high`, all as likely as each other."""

    low: int = Field(ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"{self.low}-{self.high} runs backwards; allowed: LOW-HIGH with LOW up to HIGH")
        return self

    @classmethod
    def parse(cls, text: str) -> "Range":
        """`40` or `20-60`. Raises ValueError."""
        low, dash, high = text.partition("-")
        try:
            return cls(low=int(low), high=int(high if dash else low))
        except ValidationError as error:
            raise ValueError(describe(error)) from None
        except ValueError:
            raise ValueError(f"{text!r} is no range; allowed: N or LOW-HIGH, such as 40 or 20-60") from None


class Target(_Frozen):
    """A server, and how to speak to it. `metrics` is the URL of its metrics page."""

    address: str = "127.0.0.1:50051"
    tls: bool = False
    tls_root: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None
    tenants: Path | None = None
    metrics: str | None = None
    timeout_s: Positive = 60.0
    unary: bool = False

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: allowed are both or neither")
        return self

    @property
    def secure(self) -> bool:
        return self.tls or self.tls_root is not None or self.tls_certificate is not None


class WorkloadSettings(_Frozen):
    """What is asked: of which tasks, by which tenants, with which inputs.

    Inputs come from `prompts` (a JSONL file), else are random words where `prompt_words` is set, else are examples of
    `suite`. `new_tokens` replaces the tasks' own limit, and then no stop string ends an answer.
    """

    tasks: tuple[str, ...] = ()
    task_mix: Mix = "uniform"
    tenant_mix: Mix = "uniform"
    suite: str = "builtin"
    examples_per_task: int = Field(200, ge=1)
    prompts: Path | None = None
    prompt_words: Range | None = None
    new_tokens: Range | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.prompts and self.prompt_words:
            raise ValueError("prompts and prompt_words: allowed is one of them, inputs come from one place")
        return self


class Objective(_Frozen):
    """The service level: `quantile` of the requests have their first token and their end within these times.

    A load holds where, besides, goodput is at least `goodput_share` of the offered load.
    """

    ttft_s: Positive = 1.0
    e2e_s: Positive = 3.0
    quantile: float = Field(0.95, gt=0, lt=1)
    goodput_share: float = Field(0.9, gt=0, le=1)


class Load(_Frozen):
    """One phase of load: `rate` (open loop, Poisson), `in_flight` (closed loop) or `trace` (a file).

    `requests` ends a closed loop after so many, without a window or warm-up; otherwise what is intended in the first
    `warm_up_s` seconds is left out, and what is intended in the `duration_s` after it counts. `unary` asks for whole
    answers, also where the target is asked for streams.
    """

    name: str = "run"
    rate: Positive | None = None
    in_flight: int | None = Field(None, ge=1, le=100_000)
    trace: Path | None = None
    speed: Positive = 1.0
    duration_s: Positive | None = None
    requests: int | None = Field(None, ge=1)
    warm_up_s: float = Field(3.0, ge=0, allow_inf_nan=False)
    unary: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(each is not None for each in (self.rate, self.in_flight, self.trace)) != 1:
            raise ValueError("allowed is exactly one of rate (open loop), in_flight (closed loop) and trace")
        if self.requests is not None and self.in_flight is None:
            raise ValueError("requests: allowed in a closed loop alone; an open loop ends after duration")
        if self.trace is None and self.requests is None and self.duration_s is None:
            raise ValueError("duration: needed, unless a trace or a number of requests ends the run")
        return self

    @property
    def kind(self) -> Literal["open", "closed", "trace"]:
        return "open" if self.rate is not None else "closed" if self.in_flight is not None else "trace"


class RampSettings(_Frozen):
    """How the knee is looked for: from `start_rate` times `growth` until a load does not hold, then bisection."""

    start_rate: Positive = 4.0
    growth: float = Field(2.0, gt=1, allow_inf_nan=False)
    resolution: float = Field(0.1, gt=0, lt=1)
    max_rate: Positive = 10_000.0
    step_s: Positive = 12.0
    warm_up_s: float = Field(3.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _room_to_grow(self) -> Self:
        if self.start_rate > self.max_rate:
            raise ValueError(f"start_rate {self.start_rate:g} is above max_rate {self.max_rate:g}")
        return self


class Settings(_Frozen):
    """All of one invocation. `processes` share every load evenly; `outcomes` keeps every request in the result."""

    target: Target = Target()
    workload: WorkloadSettings = WorkloadSettings()
    objective: Objective = Objective()
    processes: int = Field(1, ge=1, le=64)
    check: Literal["reply", "alone", "exact"] = "alone"
    tie_nats: float = Field(0.5, ge=0, allow_inf_nan=False)
    outcomes: bool = False


def make(model: type[Model], **values: Any) -> Model:
    """The settings, leaving out what is None. Raises LoadTestError in a user's words."""
    try:
        return model(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise LoadTestError(f"impossible settings: {describe(error)}") from None
