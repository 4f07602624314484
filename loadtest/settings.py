"""The settings of a load test. A field's flag is its name, or its alias if it has one."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import NoDecode

_RANGE = re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?")
_MIX = r"^(uniform|zipf(:\d+(\.\d+)?)?|hot:[^=]+(=\d*\.?\d+)?)$"
_MIXES = "uniform, zipf:EXPONENT (in the order of tasks) or hot:NAME=SHARE"


@dataclass(frozen=True)
class Range:
    """Whole numbers from `low` to `high`, equally likely."""

    low: int
    high: int

    @classmethod
    def parse(cls, given: Any) -> Any:
        """Parse `40` or `20-60`; leave a range unchanged. Raises ValueError."""
        # pydantic-settings turns a numeric flag into a number.
        if not isinstance(given, str | int):
            return given
        found = _RANGE.fullmatch(str(given))
        if found is None or int(found[1]) > int(found[2] or found[1]):
            raise ValueError("allowed: N or LOW-HIGH from 1 up, such as 40 or 20-60")
        return cls(int(found[1]), int(found[2] or found[1]))


def _split(given: Any) -> Any:
    return tuple(name.strip() for name in given.split(",") if name.strip()) if isinstance(given, str) else given


Length = Annotated[Range, NoDecode, BeforeValidator(Range.parse)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Mix = Annotated[str, Field(pattern=_MIX)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)


class Target(_Frozen):
    """A server, and how to connect to it."""

    address: str = Field("127.0.0.1:50051", description="HOST:PORT of the server")
    metrics: str | None = Field(None, description="URL of the server's metrics page, read while the test runs")
    tls: bool = Field(False, description="TLS with the system's root certificates")
    tls_root: Path | None = Field(None, description="TLS with these root certificates (PEM)")
    tls_certificate: Path | None = Field(None, description="the client's certificate (PEM)")
    tls_key: Path | None = Field(None, description="the client's key (PEM)")
    tls_server_name: str | None = Field(None, description="the name in the server's certificate")
    tenants: Path | None = Field(None, description="file of tenants and their API keys, NAME KEY a line")

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: found one of them; allowed: both or neither")
        return self

    @property
    def secure(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or self.tls_root is not None or self.tls_certificate is not None


class WorkloadSettings(_Frozen):
    """What is asked: tasks, tenants and inputs.

    Inputs come from the file `prompts`, are random words if `prompt_words` is set, or else are examples of `suite`.
    `new_tokens` replaces the tasks' own limit and turns stop strings off.
    """

    tasks: Names = Field((), description="A,B,...: ask these alone; default: every task that has inputs")
    task_mix: Mix = Field("uniform", description=_MIXES)
    tenant_mix: Mix = Field("uniform", description="the same over tenants")
    suite: str = Field("builtin", description="builtin, or a folder in BIG-Bench Hard's layout")
    examples_per_task: int = Field(200, ge=1, description="distinct inputs a task")
    prompts: Path | None = Field(None, description='inputs from JSONL, {"task", "input", "target"} a line')
    prompt_words: Length | None = Field(None, description="N or LOW-HIGH random words as inputs")
    new_tokens: Length | None = Field(None, description="N or LOW-HIGH: length of answers; default: the task's")
    seed: int = Field(0, ge=0, description="of arrivals, mix and inputs")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.prompts and self.prompt_words:
            raise ValueError("prompts and prompt_words: found both; allowed: one of them")
        return self


class Objective(_Frozen):
    """The service level: a share `quantile` of requests get their first token and their end within these times.

    A load holds if goodput is also at least `goodput_share` of the offered load.
    """

    ttft_s: Positive = Field(1.0, alias="slo_ttft", description="service level: seconds to the first token")
    e2e_s: Positive = Field(3.0, alias="slo_e2e", description="service level: seconds to the whole answer")
    quantile: float = Field(0.95, gt=0, lt=1, alias="slo_quantile", description="share of requests that must hold it")
    goodput_share: float = Field(0.9, gt=0, le=1, alias="slo_goodput", description="least goodput / offered load")


class CommonSettings(WorkloadSettings, Objective):
    """The settings that do not depend on the server."""

    timeout_s: Positive = Field(60.0, alias="timeout", description="a request's deadline, seconds")
    unary: bool = Field(False, description="call Generate instead of GenerateStream")
    check: Literal["reply", "alone", "exact"] = Field(
        "alone",
        description="what makes an answer wrong: reply, it is incomplete or another request's; alone, also if it is "
        "neither exact nor what the server answers to the same input alone; exact, also if it is not exact",
    )
    tie_nats: Seconds = Field(1.0, alias="tie", description="tokens this near in log-probability are a tie")
    outcomes: bool = Field(False, description="keep every request in the result")
    out: Path = Field(Path("out/loadtest"), description="folder for result.json and report.html")


class Settings(CommonSettings, Target):
    """All settings of a load test except the load itself."""

    def to_json(self) -> dict[str, Any]:
        """Every setting for the result, in groups."""
        rest = self.model_dump(mode="json", include=set(Settings.model_fields), exclude_none=True)
        groups = (("target", Target), ("workload", WorkloadSettings), ("objective", Objective))
        made = {
            name: {field: rest.pop(field) for field in group.model_fields if field in rest} for name, group in groups
        }
        return made | rest


class PhaseSettings(_Frozen):
    """One phase of load: `rate` (open loop, Poisson), `in_flight` (closed loop) or `trace` (a file).

    Requests due in the first `warm_up_s` seconds do not count; those due in the next `duration_s` seconds do. A closed
    loop with `requests` ends after so many, and all of them count.
    """

    rate: Positive | None = Field(None, description="open loop: Poisson arrivals, so many requests/s on average")
    in_flight: int | None = Field(None, ge=1, le=100_000, description="closed loop: requests under way at all times")
    trace: Path | None = Field(None, description='open loop: JSONL, {"at": SECONDS, "task"} a line')
    speed: Positive = Field(1.0, description="play the trace so many times as fast")
    requests: int | None = Field(None, ge=1, description="closed loop: end after so many, all of which count")
    duration_s: Positive | None = Field(
        None, alias="duration", description="seconds that count; default: 30, or a trace's own"
    )
    warm_up_s: Seconds = Field(
        3.0, alias="warm_up", description="seconds left out at the start; default: 3, or 0 for a trace"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        # Defaults use field names, flags use aliases; pydantic prefers aliases.
        if given.get("trace"):
            return {"warm_up_s": 0.0, **given}
        return given if given.get("requests") else {"duration_s": 30.0, **given}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(each is not None for each in (self.rate, self.in_flight, self.trace)) != 1:
            raise ValueError(
                "rate, in_flight and trace: allowed: exactly one of rate (open loop), in_flight (closed loop) and trace"
            )
        if self.requests is not None and self.in_flight is None:
            raise ValueError("requests: allowed in a closed loop alone; an open loop ends after duration")
        return self

    @property
    def kind(self) -> Literal["open", "closed", "trace"]:
        return "open" if self.rate is not None else "closed" if self.in_flight is not None else "trace"


class RampSettings(_Frozen):
    """The search for the knee: multiply `start_rate` by `growth` until a load does not hold, then bisect."""

    start_rate: Positive = Field(4.0, description="requests/s of the first step")
    growth: float = Field(2.0, gt=1, allow_inf_nan=False, description="factor from step to step")
    resolution: float = Field(0.1, gt=0, lt=1, description="how near the knee is found")
    max_rate: Positive = Field(10_000.0, description="no step goes beyond it, requests/s")
    step_s: Positive = Field(12.0, alias="step", description="seconds of a step that count")
    warm_up_s: Seconds = Field(3.0, alias="warm_up", description="seconds of a step before them")

    @model_validator(mode="after")
    def _room_to_grow(self) -> Self:
        if self.start_rate > self.max_rate:
            raise ValueError(f"start_rate {self.start_rate:g} is above max_rate {self.max_rate:g}")
        return self
