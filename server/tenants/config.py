"""The entries of tenants.yaml and their validation."""

import hashlib
import hmac
import re
import time
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from enum import StrEnum
from fnmatch import translate
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from server.settings import is_loopback
from server.tenants.keys import KEY_ID_PATTERN, checked_hash

MAX_ISSUERS = 16
_ID = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$")]
_TASK_PATTERN = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.\-*?\[\]!]{1,128}$")]
_TENANT_PATTERN = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.\-*?\[\]!]{1,128}$")]
# Name of an InferenceObjective in Kubernetes.
_OBJECTIVE = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9.\-]{0,251}[a-z0-9])?$")]
_CERTIFICATE = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class TenantsError(ValueError):
    """A wrong tenants file; the message names the file, the entry, what was found and what is allowed."""


class Priority(StrEnum):
    """Classes of requests, most urgent first. A class is served while no request of a more urgent class waits."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"

    @cached_property
    def rank(self) -> int:
        """The class's rank; 0 is the most urgent."""
        return list(Priority).index(self)


def _moment(text: object) -> datetime:
    """Parse a time; a date means its last moment in UTC."""
    try:
        return datetime.combine(date.fromisoformat(str(text)), time_of_day.max, UTC)
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError as error:
        raise ValueError(f"{error}; allowed: a date such as 2026-12-31, or 2026-12-31T12:00:00Z") from None
    if moment.tzinfo is None:
        raise ValueError("no time zone; allowed: a date such as 2026-12-31, or 2026-12-31T12:00:00Z")
    return moment


class ApiKey(BaseModel):
    """An API key's public id, a hash of the whole key, and the moment from which the key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=KEY_ID_PATTERN)
    hash: Annotated[str, AfterValidator(checked_hash)] = Field(repr=False)
    expires: Annotated[datetime, BeforeValidator(_moment)] | None = None

    def matches(self, key: str) -> bool:
        """Whether the hash is that of `key`, compared in constant time."""
        return hmac.compare_digest(self.hash, f"sha256${hashlib.sha256(key.encode()).hexdigest()}")

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires.timestamp() <= time.time()


_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
# The signature algorithms for each kind of public key.
ALGORITHMS = {"RSA": _RSA, "P-256": ("ES256",), "P-384": ("ES384",), "P-521": ("ES512",), "Ed25519": ("EdDSA",)}
_Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


def is_url(jwks: str) -> bool:
    """Whether an issuer's keys are fetched, rather than read from a file."""
    return "://" in jwks


def is_fetched_safely(url: str) -> bool:
    """Whether a URL's content is protected in transit: by TLS, or because the URL is on this machine."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    host = parts.hostname or ""
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host)))


def _fetched_safely(jwks: str) -> str:
    if is_url(jwks) and not is_fetched_safely(jwks):
        raise ValueError("allowed: an https:// URL, an http:// URL of this machine, or a file")
    return jwks


class Issuer(BaseModel):
    """An issuer of signed tokens (JWT) that name tenants. A token must contain issuer, audience and expiry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str = Field(min_length=1, max_length=512)
    audience: str = Field(min_length=1, max_length=512)
    # The issuer's public keys: a URL, or a file beside the tenants file; None: the URL in its openid-configuration.
    jwks: Annotated[str, AfterValidator(_fetched_safely)] | None = Field(None, min_length=1, max_length=2048)
    algorithms: tuple[_Algorithm, ...] = Field(("RS256", "ES256", "EdDSA"), min_length=1)
    tenant_claim: str = Field("sub", min_length=1, max_length=256)
    # Most seconds by which the clocks of issuer and server may differ.
    leeway_s: float = Field(30.0, ge=0, le=300)

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        if self.jwks is None and not is_fetched_safely(self.issuer):
            raise ValueError(
                f"jwks: found none; allowed: a URL or a file, or an issuer that is an https:// URL, not {self.issuer!r}"
            )
        return self

    @property
    def keys_file(self) -> Path | None:
        """The file of its keys, if they are in one."""
        return None if self.jwks is None or is_url(self.jwks) else Path(self.jwks)


class Tenant(BaseModel):
    """One tenant. None means no limit. token_issuers: whose tokens may name the tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: _ID
    api_keys: tuple[ApiKey, ...] = Field((), max_length=64)
    certificates: tuple[_CERTIFICATE, ...] = Field((), max_length=64)
    token_issuers: tuple[str, ...] = Field((), max_length=16)
    tasks: tuple[_TASK_PATTERN, ...] = Field(("*",), max_length=256)
    weight: float = Field(1.0, ge=1e-3, le=1e3)
    priority: Priority = Priority.STANDARD
    requests_per_second: float | None = Field(None, gt=0, le=1e6)
    tokens_per_second: float | None = Field(None, gt=0, le=1e9)
    # Burst: seconds' worth of a rate that may be used at once.
    burst_seconds: float = Field(1.0, ge=0.1, le=3600)
    max_in_flight: int | None = Field(None, ge=1)
    max_queue: int | None = Field(None, ge=0)
    # Limits of one request. Characters: total of its stop strings.
    max_new_tokens: int | None = Field(None, ge=1)
    max_stop_characters: int | None = Field(None, ge=0)
    # Limits of documents kept for use by id; None means the server's settings of the same names.
    max_documents: int | None = Field(None, ge=0)
    max_document_mib: float | None = Field(None, ge=0, le=65536)
    max_leased_tokens: int | None = Field(None, ge=0)
    # Budgets of a day and of a calendar month, in UTC.
    daily_requests: int | None = Field(None, ge=0)
    daily_tokens: int | None = Field(None, ge=0)
    monthly_requests: int | None = Field(None, ge=0)
    monthly_tokens: int | None = Field(None, ge=0)
    # Whether the tenant may send prompts as token ids.
    token_ids: bool = False
    admin: bool = False
    # For a trusted proxy: the tenants that it may name in its requests' headers; never an admin.
    speaks_for: tuple[_TENANT_PATTERN, ...] = Field((), max_length=256)

    @cached_property
    def _named(self) -> re.Pattern[str]:
        return re.compile("|".join(map(translate, self.speaks_for)) or "(?!)")

    @cached_property
    def _allowed(self) -> re.Pattern[str]:
        return re.compile("|".join(translate(pattern) for pattern in self.tasks) or "(?!)")

    @cached_property
    def has_budget(self) -> bool:
        budgets = (self.daily_requests, self.daily_tokens, self.monthly_requests, self.monthly_tokens)
        return any(budget is not None for budget in budgets)

    @cached_property
    def has_quotas(self) -> bool:
        """Whether its rates or its queue are limited."""
        quotas = (self.requests_per_second, self.tokens_per_second, self.max_queue)
        return any(quota is not None for quota in quotas)

    def allows(self, task_id: str) -> bool:
        """Whether the tenant may ask this task."""
        return self._allowed.fullmatch(task_id) is not None

    def may_name(self, tenant: "Tenant") -> bool:
        """Whether headers of this tenant's requests may name another tenant."""
        return not tenant.admin and self._named.fullmatch(tenant.id) is not None

    def lowered(self, priority: Priority) -> "Tenant":
        """The tenant with this class if it is less urgent than its own, else unchanged."""
        return self.model_copy(update={"priority": priority}) if priority.rank > self.priority.rank else self

    def share(self, replicas: int) -> "Tenant":
        """The tenant as one of `replicas` servers treats it: its quotas divided, whole numbers rounded up."""
        rates = {name: getattr(self, name) for name in ("requests_per_second", "tokens_per_second")}
        budgets = [f"{period}_{what}" for period in ("daily", "monthly") for what in ("requests", "tokens")]
        numbers = {name: getattr(self, name) for name in ("max_in_flight", "max_queue", *budgets)}
        shares = {name: value / replicas for name, value in rates.items() if value is not None}
        shares |= {name: -(-value // replicas) for name, value in numbers.items() if value is not None}
        return self.model_copy(update=shares)


# The tenant of a call before authentication.
UNAUTHENTICATED = Tenant(id="unauthenticated", tasks=())
# The tenant of every caller if there is no tenants file. It is an admin only if the server listens on this machine
# only.
OPEN_TENANT = Tenant(id="open", token_ids=True)


class TenantsFile(BaseModel):
    """The tenants file, tenants.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenants: tuple[Tenant, ...] = Field(min_length=1)
    issuers: tuple[Issuer, ...] = Field((), max_length=MAX_ISSUERS)
    # If false, tenants share no cached blocks: an answer's timing must not reveal another tenant's prompts.
    share_prefix_cache: bool = False
    # The class of the requests for which a trusted proxy names an objective.
    objectives: dict[_OBJECTIVE, Priority] = Field({}, max_length=256)
    # Whether quotas apply to each server or to all servers together.
    quotas: Literal["replica", "fleet"] = "replica"

    def tenants_of_replica(self, replicas: int | None) -> tuple[Tenant, ...]:
        """The tenants with the quotas that one of `replicas` servers grants. Raises ValueError."""
        if self.quotas == "replica":
            return self.tenants
        if replicas is None:
            raise ValueError("quotas: found fleet without the setting replicas; allowed: both, or quotas: replica")
        return tuple(tenant.share(replicas) for tenant in self.tenants)

    @model_validator(mode="after")
    def _identities_are_unique(self) -> "TenantsFile":
        issuers = {each.issuer for each in self.issuers}
        if len(issuers) < len(self.issuers):
            raise ValueError("issuers: found one twice; allowed: each once")
        seen: dict[tuple[str, str], str] = {}
        for tenant in self.tenants:
            if tenant.id == UNAUTHENTICATED.id:
                raise ValueError(
                    f"tenant id {tenant.id!r} is reserved: logs and metrics use it for callers without a key"
                )
            if not (tenant.api_keys or tenant.certificates or tenant.token_issuers):
                raise ValueError(
                    f"tenant {tenant.id} has neither api_keys nor certificates nor token_issuers; "
                    "allowed: one of them at least"
                )
            if unknown := set(tenant.token_issuers) - issuers:
                raise ValueError(
                    f"token_issuers of tenant {tenant.id}: found {sorted(unknown)[0]!r}; allowed: those of `issuers`"
                )
            names = [("tenant id", tenant.id), *(("API key id", key.id) for key in tenant.api_keys)]
            names += [("certificate", name) for name in tenant.certificates]
            for name in names:
                if name in seen:
                    where = f"tenants {seen[name]} and {tenant.id}"
                    raise ValueError(f"{name[0]} {name[1]!r}: found twice, in {where}; allowed: once")
                seen[name] = tenant.id
        return self
