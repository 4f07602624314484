"""Every setting of the server: by flag, environment (MTLORA_...), file or default; the first that is set wins.

`Settings.model_fields` has the name, type, default and description of each; `flag_of` and `variable_of` give its flag
and its environment variable.
"""

import difflib
import ipaddress
import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, SettingsConfigDict

ENV_PREFIX = "MTLORA_"
NO_BACKBONE = "none"


class SettingsError(ValueError):
    """Invalid settings; one line for each with the value found, its source, and what is allowed."""


class Settings(BaseSettings):
    """The server's settings. Fields left at None depend on the machine and the backbone."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        # Groups of settings in `mtlora-server serve --help`.
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_parse_none_str="unset",
    )

    backbone: str = Field(
        "default",
        min_length=1,
        description='language backbone: "default", a Hugging Face model folder, a hub id, or "none" for images alone',
    )
    vision_backbone: str | None = Field(
        None, min_length=1, description='vision backbone: "vision", a Hugging Face folder, or a hub id; unset: none'
    )
    adapters: str | None = Field(
        None, description="folder of adapter checkpoints, NAME/VERSION/ each, or an fsspec URL of one, such as s3://..."
    )
    allow_no_tasks: bool = Field(False, description="start even if no adapter can be served")
    adapters_read_only: bool = Field(
        False,
        description="refuse to start if this process can write the folder of adapters; mount its volume read-only",
    )
    adapters_poll_s: float = Field(
        2.0,
        gt=0,
        le=3600,
        description="seconds between scans of the adapters, in addition to the kernel's reports of changes",
    )
    storage_timeout_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="seconds without progress after which a call to the adapters' storage is abandoned",
    )
    adapter_slots: int = Field(
        256, ge=1, description="adapter versions resident in the engine; each has a slot for each of its tasks"
    )
    adapter_blocks: Literal["ffn", "attention", "both"] = Field(
        "both",
        description="blocks beside which adapters may have paths; adapters with paths beside other blocks are refused",
    )
    adapter_max_rank: int = Field(64, ge=1, le=512, description="largest rank of an adapter on a GPU")
    adapter_max_experts: int = Field(32, ge=1, le=256, description="most experts of an adapter on a GPU")
    adapter_max_groups: int = Field(32, ge=1, le=4096, description="most groups of dimensions of an adapter on a GPU")
    adapter_side_stream: bool = Field(
        False, description="on a GPU, compute half of an FFN's path on a second stream, beside the FFN"
    )
    host_cache_gib: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="GiB of memory for adapters evicted from the engine"
    )
    adapter_cache: Path | None = Field(
        None, description="folder for copies of verified adapters; unset: the system's temporary folder"
    )
    adapter_cache_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="GiB of such copies; a version that exceeds it is refused; unset: no limit",
    )
    max_adapter_mib: int = Field(1024, ge=1, le=4096, description="MiB of the largest adapter accepted")
    max_uploads: int = Field(
        4, ge=0, description="unfinished uploads of adapters that are kept, for a day each; 0: uploads are refused"
    )
    verify_timeout_s: float = Field(60.0, ge=1, le=3600, description="seconds allowed to verify an adapter")

    host: str = Field("127.0.0.1", min_length=1, description="address on which gRPC and health listen")
    port: int = Field(50051, ge=0, le=65535, description="port of gRPC; 0: a free one")
    metrics_host: str = Field("127.0.0.1", min_length=1, description="address on which /metrics listens")
    metrics_port: int = Field(9090, ge=0, le=65535, description="port of /metrics; 0: a free one")
    loop_delay_interval_s: float = Field(
        1.0, ge=0.005, le=60, description="seconds between samples of how late the server's event loop runs"
    )

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of the backbone; auto: as its weights, or float32 on a CPU without bfloat16 products"
    )
    max_model_len: int = Field(1024, ge=16, description="prompt and answer tokens of one sequence")
    max_num_seqs: int = Field(64, ge=1, description="sequences in one step of one engine")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="tokens in one step; unset: the engine's choice")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="GiB of KV cache of each rank; unset: 1 on CPU, gpu_memory_utilization on GPU",
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of GPU memory, if kv_cache_gib is unset")
    enforce_eager: bool | None = Field(None, description="do not compile; unset: true on CPU, false on GPU")
    enable_prefix_caching: bool = Field(True, description="share the KV cache of equal prompt prefixes")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of sampling for requests without one")
    tensor_parallel_size: int = Field(1, ge=1, description="ranks that split every layer")
    pipeline_parallel_size: int = Field(1, ge=1, description="ranks that split the sequence of layers")
    data_parallel_size: int = Field(1, ge=1, description="engines behind this server, each with ranks of its own")
    distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        None,
        description='where ranks run: "mp" on this machine, "ray" on a Ray cluster; unset: one rank on CPU runs in the '
        "engine's own process, otherwise the engine chooses",
    )
    quantization: str | None = Field(
        None, min_length=1, description="quantisation of the backbone's weights; unset: as its config says"
    )
    adapter_backbone_check: Literal["strict", "architecture"] = Field(
        "strict",
        description='"strict" serves only adapters trained on these very weights; "architecture" also those trained on '
        "others of the same shape, as a quantised backbone needs",
    )
    omp_threads_bind: str | None = Field(
        None, min_length=1, description='cores of the engine\'s threads, such as "0-3" or, by rank, "0|1"; unset: all'
    )

    vision_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of the vision backbone; auto: as its weights on a CPU, the engine's choice on a GPU"
    )
    vision_max_num_seqs: int = Field(
        16,
        ge=1,
        description="images in one step of one engine, of 112 x 112 pixels; on a CPU, more are no faster and delay "
        "other images",
    )
    vision_max_size: int = Field(
        518, ge=8, le=1024, description="pixels of a side of the largest square that a task prepares its images to"
    )
    vision_position_cost: float = Field(
        0.4,
        gt=0,
        allow_inf_nan=False,
        description="what a position of an image costs a tenant in the fair queue, in prompt tokens of the language "
        "backbone",
    )
    vision_gpu_memory_utilization: float = Field(
        0.1, gt=0, le=1, description="share of GPU memory for the vision backbone's engine"
    )
    vision_data_parallel_size: int = Field(
        1,
        ge=1,
        description="engines with the vision backbone; on a CPU, they divide the cores: more images a second, each of "
        "them later",
    )
    vision_omp_threads_bind: str | None = Field(
        None,
        min_length=1,
        description="cores of the threads of the vision backbone's engine; unset: as omp_threads_bind. With neither "
        "set, a step of one engine takes half of the cores while the other engine works",
    )
    max_image_pixels: int = Field(
        25_000_000,
        ge=1,
        le=1 << 28,
        description="pixels of the largest image, by its header; larger ones are not decoded",
    )
    image_threads: int | None = Field(
        None, ge=1, le=256, description="threads that decode images; unset: half of the cores, 8 at most"
    )

    engine_hang_s: float = Field(
        60.0, ge=1, le=3600, description="seconds without a step, while work waits, until the engine is restarted"
    )
    engine_max_failures: int = Field(
        3,
        ge=1,
        description="engine failures within engine_failure_window_s after which the engine starts again; one more ends "
        "a server of one engine",
    )
    engine_failure_window_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="seconds; see engine_max_failures"
    )

    max_in_flight: int | None = Field(
        None,
        ge=1,
        description="requests for one backbone admitted at once; unset: 4 x the larger of max_num_seqs x "
        "data_parallel_size and, with a vision backbone, vision_max_num_seqs x vision_data_parallel_size",
    )
    max_message_bytes: int | None = Field(
        None,
        ge=1024,
        le=1 << 28,
        description="bytes of the largest request message; unset: 16 MiB with a vision backbone, for photographs, and "
        "1 MiB without",
    )
    document_lifetime_s: float = Field(
        600.0, ge=0, allow_inf_nan=False, description="seconds after its last use that a document_id is known"
    )
    max_documents: int = Field(
        1024, ge=0, description="documents known by id, a tenant; the least recently used go first"
    )
    max_document_mib: float = Field(
        16.0, ge=0, allow_inf_nan=False, description="MiB of the documents known by id, a tenant; a token takes 4 bytes"
    )
    max_leased_tokens: int = Field(
        8192,
        ge=0,
        description="tokens of documents, a tenant, whose blocks stay in the engine's cache until document_lifetime_s; "
        "half of the cache at most, and never ahead of running requests; 0: none",
    )
    grace_period_s: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="seconds for running requests to finish after SIGTERM"
    )
    tenants: Path | None = Field(
        None,
        description="tenants file; unset: one open tenant, without keys or quotas, which is an admin if host is a "
        "loopback address",
    )
    replicas: int | None = Field(
        None, ge=1, description="servers that share the quotas of a tenants file with `quotas: fleet`"
    )
    drain_delay_s: float = Field(
        1.0,
        ge=0,
        le=3600,
        description="seconds after SIGTERM during which health says not serving while calls are still taken",
    )
    tls_certificate: Path | None = Field(None, description="PEM certificate chain of gRPC; unset: no TLS")
    tls_key: Path | None = Field(None, description="PEM private key of the certificate")
    tls_client_ca: Path | None = Field(None, description="PEM authorities that clients' certificates must come from")
    reflection: bool = Field(True, description="answer gRPC's reflection protocol, to everybody")
    max_connections: int = Field(16384, ge=1, description="open connections")
    max_concurrent_streams: int = Field(1024, ge=1, description="calls at the same time on one connection")
    keepalive_s: float = Field(60.0, ge=1, le=86400, description="seconds of silence until a connection is pinged")
    keepalive_timeout_s: float = Field(
        20.0, ge=1, le=3600, description="seconds until an unanswered ping ends a connection"
    )
    min_ping_interval_s: float = Field(
        10.0, ge=0, le=3600, description="seconds; connections that ping more often are closed"
    )
    max_connection_idle_s: float = Field(3600.0, ge=1, description="seconds until a connection without calls is closed")
    max_connection_age_s: float = Field(
        3600.0,
        ge=1,
        le=86400,
        description="seconds until clients are asked to reconnect, so that they spread over servers",
    )
    max_connection_age_grace_s: float = Field(
        600.0, ge=1, le=86400, description="seconds that calls may go on after max_connection_age_s"
    )
    request_timeout_s: float = Field(
        10.0, gt=0, le=3600, description="seconds for a connection's handshake, and for the message of a call to come"
    )
    max_anonymous_calls: int = Field(
        256, ge=1, description="calls without a key (health, reflection) that one address may hold open"
    )
    slow_reader_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="seconds after which a stream is ended if its client does not read it",
    )

    health_port: int | None = Field(
        None, ge=0, le=65535, description="port of a second listener, on host, for health checks alone; unset: none"
    )
    routing_sample_steps: int = Field(
        0, ge=0, description="sample the routing of tokens for the metrics, every so many steps; 0: never"
    )
    metrics_exemplars: bool = Field(False, description="add trace or request ids to histograms, in OpenMetrics")
    otlp_endpoint: str | None = Field(
        None, min_length=1, description="OpenTelemetry collector (OTLP/gRPC) for a trace of each request; unset: none"
    )
    otlp_metrics: bool = Field(
        True, description="send the collector metrics too, by the names of OpenTelemetry's GenAI conventions"
    )
    trace_sample_ratio: float = Field(1.0, ge=0, le=1, description="share of requests that are traced")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level logged; SIGUSR1 makes it debug, SIGUSR2 as set again"
    )
    log_prompts: bool = Field(False, description="log prompts too")
    audit_log: str | None = Field(
        None, min_length=1, description='file for a line on every administrative call, or "stderr"; unset: none'
    )
    usage_dir: Path | None = Field(
        None,
        description="folder for the usage of tenants, a separate one for each server; unset: usage and budgets are "
        "counted in memory",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapters_can_be_read(cls, adapters: Any) -> Any:
        if adapters is None:
            return None
        if is_url(str(adapters)):
            _check_protocol(str(adapters))
        elif not Path(adapters).is_dir():
            raise ValueError(
                "not a folder; allowed: an existing folder of adapter checkpoints, NAME/VERSION/ each, or a URL of one"
            )
        return str(adapters)

    @field_validator("host", "metrics_host")
    @classmethod
    def _is_address(cls, host: str) -> str:
        """The host without the brackets of an IPv6 address."""
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            if ":" in bare:
                ip_address(bare)
        except ValueError:
            raise ValueError(
                "no address; allowed: a name, an IPv4 address, or an IPv6 address such as ::1 or [::1], without a port"
            ) from None
        return bare

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate, tls_key: found one alone; allowed: both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: found without tls_certificate; allowed: with it")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.language_backbone is None and self.vision_backbone is None:
            raise ValueError("backbone: found none, and no vision_backbone; allowed: one of the two, or both")
        if self.adapters is None and not self.allow_no_tasks:
            raise ValueError("adapters: not set; allowed: a folder of adapters (allow_no_tasks starts without)")
        if self.adapters_read_only and self.adapters and os.access(self.adapters, os.W_OK):
            raise ValueError(
                f"adapters_read_only: found {self.adapters} writable; allowed: a volume that is read-only for this "
                "process"
            )
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: found {self.max_num_batched_tokens}; "
                f"allowed: at least max_num_seqs, {self.max_num_seqs}"
            )
        return self

    @property
    def engine_ranks(self) -> int:
        """Workers of one engine with the language backbone."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def running_texts(self) -> int:
        """Sequences that all engines with the language backbone run at a time."""
        return self.max_num_seqs * self.data_parallel_size

    @property
    def running_images(self) -> int:
        """Images that all engines with the vision backbone run at a time."""
        return self.vision_max_num_seqs * self.vision_data_parallel_size

    @property
    def in_flight_limit(self) -> int:
        """Requests in flight for one backbone."""
        return self.max_in_flight or 4 * max(self.running_texts, self.running_images if self.vision_backbone else 1)

    @property
    def message_limit(self) -> int:
        """Bytes of the largest request message."""
        return self.max_message_bytes or (16 << 20 if self.vision_backbone else 1 << 20)

    @property
    def language_backbone(self) -> str | None:
        """The language backbone; None for a server with image tasks only."""
        return None if self.backbone == NO_BACKBONE else self.backbone


def joined(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def flag_of(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def variable_of(setting: str) -> str:
    """The setting's environment variable."""
    return f"{ENV_PREFIX}{setting.upper()}"


def is_loopback(host: str) -> bool:
    """Whether the address is reachable only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_url(adapters: str) -> bool:
    """Whether `adapters` is the URL of a storage and not a folder."""
    return "://" in adapters


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Settings from flags, then the environment, then the YAML file `config`, then defaults. Raises SettingsError."""
    in_file = _read_file(config) if config else {}
    environment = EnvSettingsSource(Settings)
    sources = (InitSettingsSource(Settings, dict(flags)), environment, InitSettingsSource(Settings, in_file))
    try:
        return Settings(_build_sources=(sources, dict(flags)))
    except ValidationError as error:
        in_environment = environment()
        lines = [_explain(item, flags, in_environment, in_file, config) for item in error.errors(include_url=False)]
        raise SettingsError("\n".join(lines)) from None


def _read_file(path: Path) -> dict[str, Any]:
    # Do not use pydantic-settings' YAML source: it takes a missing file for an empty one, and its errors name no file.
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"config: found {path}: not a readable YAML file: {error}") from None
    if not isinstance(found, dict | None):
        raise SettingsError(f"config: found {path}: a {type(found).__name__}; allowed: a mapping of settings")
    return found or {}


def _explain(
    item: Any,
    flags: Mapping[str, Any],
    environment: Mapping[str, Any],
    in_file: Mapping[str, Any],
    config: Path | None,
) -> str:
    """One line for one violation: the setting, what was found and where, what is allowed."""
    message = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return str(message)
    name = str(item["loc"][0])
    if name in flags:
        where = f"flag {flag_of(name)}"
    elif name in environment:
        where = f"environment variable {variable_of(name)}"
    elif name in in_file:
        where = f"file {config}"
    else:
        where = "default"
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Settings.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(Settings.model_fields)}"
        return f"{name}: no such setting ({where}){hint}"
    return f"{name}: found {str(item['input'])!r} ({where}); {message}"


def _check_protocol(url: str) -> None:
    """Raise ValueError unless fsspec knows the protocol and the package for it is installed."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{protocol}://: {error}; allowed: a folder, or a URL that fsspec can read") from None
