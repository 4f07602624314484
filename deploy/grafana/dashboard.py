"""Makes the Grafana dashboard: `python -m deploy.grafana.dashboard` writes mtlora.json beside this file.

A row is a question an operator has; a panel is (title, unit, what it tells, queries). `$by` in a query selects what the
dashboard's variables choose.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("mtlora.json")
_SELECT = 'namespace=~"$namespace", pod=~"$pod"'
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


@dataclass(frozen=True)
class Panel:
    """One chart. queries: (PromQL, legend) pairs; thresholds: (value, colour) steps of the background line."""

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    stacked: bool = False
    thresholds: tuple[tuple[float, str], ...] = field(default=())


def _rate(metric: str, by: str = "", match: str = "") -> str:
    inner = f"rate({metric}{{$by{match}}}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def _quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"histogram_quantile({q}, {_rate(f'{metric}_bucket', 'le')})", f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)
    )


def _mean(metric: str, by: str = "") -> str:
    return _ratio(f"{metric}_sum", f"{metric}_count", by)


def _ratio(over: str, under: str, by: str = "") -> str:
    return f"{_rate(over, by)} / {_rate(under, by)}"


_ANSWERS = ', method=~"Generate.*"'
ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Is it well?",
        (
            Panel(
                "Replicas that serve",
                "none",
                "Pods whose engine takes requests, of all that are scraped.",
                (("sum(mtlora_serving{$by})", "serving"), ("count(mtlora_serving{$by})", "all")),
                kind="stat",
            ),
            Panel(
                "Requests by status",
                "reqps",
                "INVALID_ARGUMENT, NOT_FOUND, CANCELLED are the clients' own.",
                ((_rate("mtlora_requests_total", "status", _ANSWERS), "{{status}}"),),
                stacked=True,
            ),
            Panel(
                "Failed requests",
                "percentunit",
                "What the server owes: UNAVAILABLE, INTERNAL, DEADLINE_EXCEEDED.",
                (
                    ('mtlora:error_ratio:rate5m{namespace=~"$namespace"}', "5 min"),
                    ('mtlora:error_ratio:rate1h{namespace=~"$namespace"}', "1 h"),
                ),
                thresholds=((0.01, "red"),),
            ),
            Panel(
                "Tokens",
                "none",
                "Prompt tokens read and tokens generated, a second.",
                (
                    (_rate("mtlora_prompt_tokens_total"), "prompt"),
                    (_rate("mtlora_completion_tokens_total"), "generated"),
                ),
            ),
            Panel(
                "Engine restarts",
                "none",
                "Engines lost and started anew within the hour; each fails what was running.",
                (("sum by (reason) (increase(mtlora_engine_restarts_total{$by}[1h]))", "{{reason}}"),),
                kind="stat",
                thresholds=((1, "red"),),
            ),
            Panel(
                "What runs",
                "none",
                "Versions in use.",
                (("count by (version, backbone) (mtlora_build_info{$by})", "{{version}} {{backbone}}"),),
                kind="stat",
            ),
        ),
    ),
    (
        "Tenants",
        (
            Panel(
                "Requests by tenant",
                "reqps",
                "The busiest by name, the rest as `other`.",
                ((_rate("mtlora_tenant_requests_total", "tenant"), "{{tenant}}"),),
                stacked=True,
            ),
            Panel(
                "First token by tenant, p95",
                "s",
                "A tenant apart from the others is over its share, or starved.",
                (('mtlora:tenant_time_to_first_token_seconds:p95_5m{namespace=~"$namespace"}', "{{tenant}}"),),
                thresholds=((1, "red"),),
            ),
            Panel(
                "End to end by tenant, p95",
                "s",
                "From receipt to the end of the answer.",
                (
                    (
                        f"histogram_quantile(0.95, {_rate('mtlora_tenant_request_seconds_bucket', 'tenant, le')})",
                        "{{tenant}}",
                    ),
                ),
            ),
            Panel(
                "Queued by tenant",
                "none",
                "Admitted requests that wait for their turn.",
                (("sum by (tenant) (mtlora_tenant_requests_queued{$by})", "{{tenant}}"),),
                stacked=True,
            ),
            Panel(
                "In flight by tenant",
                "none",
                "Requests that the engine has; a tenant's max_in_flight bounds them.",
                (("sum by (tenant) (mtlora_tenant_requests_in_flight{$by})", "{{tenant}}"),),
                stacked=True,
            ),
            Panel(
                "Tokens by tenant",
                "none",
                "Prompt and generated, a second.",
                ((_rate("mtlora_tenant_tokens_total", "tenant, kind"), "{{tenant}} {{kind}}"),),
                stacked=True,
            ),
            Panel(
                "Refused for a quota",
                "reqps",
                "By tenant and quota.",
                ((_rate("mtlora_quota_refusals_total", "tenant, quota"), "{{tenant}} {{quota}}"),),
            ),
            Panel(
                "Given up under overload",
                "reqps",
                "By tenant and reason.",
                ((_rate("mtlora_shed_requests_total", "tenant, reason"), "{{tenant}} {{reason}}"),),
            ),
            Panel(
                "Service by tenant",
                "none",
                "As the fair queue counts it, a second: by weight alike while tenants wait.",
                ((_rate("mtlora_tenant_service_total", "tenant"), "{{tenant}}"),),
                stacked=True,
            ),
            Panel(
                "Tenants file",
                "none",
                "Tenants that are known, and changes of the file that were refused within the hour.",
                (
                    ("max(mtlora_tenants{$by})", "tenants"),
                    ("sum(increase(mtlora_tenants_reload_failures_total{$by}[1h]))", "refused"),
                ),
                kind="stat",
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel(
                "Time to first token",
                "s",
                "From receipt.",
                _quantiles("mtlora_time_to_first_token_seconds"),
                thresholds=((1, "red"),),
            ),
            Panel("Between tokens", "s", "Of one sequence.", _quantiles("mtlora_inter_token_latency_seconds")),
            Panel("End to end", "s", "From receipt to the end of the answer.", _quantiles("mtlora_request_seconds")),
            Panel("Queue", "s", "From receipt until first scheduled.", _quantiles("mtlora_queue_seconds")),
            Panel(
                "End to end, distribution",
                "s",
                "Colour is requests.",
                ((_rate("mtlora_request_seconds_bucket", "le"), "{{le}}"),),
                kind="heatmap",
            ),
            Panel(
                "Tokens a request",
                "none",
                "Means; longer prompts and answers explain slower requests.",
                (
                    (_mean("mtlora_request_prompt_tokens"), "prompt"),
                    (_mean("mtlora_request_completion_tokens"), "generated"),
                ),
            ),
        ),
    ),
    (
        "Capacity",
        (
            Panel(
                "In flight by pod",
                "none",
                "Admitted requests that are not finished, and those of them that wait for their turn.",
                (
                    ("sum by (pod) (mtlora_requests_in_flight{$by})", "{{pod}}"),
                    ("sum by (pod) (mtlora_requests_queued{$by})", "queued {{pod}}"),
                ),
                stacked=True,
            ),
            Panel(
                "Sequences in the engines",
                "none",
                "Waiting ones have no place in the batch.",
                (
                    ("sum(mtlora_engine_running_sequences{$by})", "running"),
                    ("sum(mtlora_engine_waiting_sequences{$by})", "waiting"),
                ),
                stacked=True,
            ),
            Panel(
                "KV cache",
                "percentunit",
                "Of the fullest engine of each pod.",
                (("max by (pod) (mtlora_engine_kv_cache_usage_ratio{$by})", "{{pod}}"),),
                thresholds=((0.95, "red"),),
            ),
            Panel(
                "Sequences of a step",
                "none",
                "Mean batch; near max_num_seqs a replica is full.",
                ((_mean("mtlora_engine_step_sequences", "pod"), "{{pod}}"),),
            ),
            Panel(
                "Requests by task",
                "reqps",
                "The busiest by name, the rest as `other`.",
                ((f"topk(15, {_rate('mtlora_requests_total', 'task', _ANSWERS)})", "{{task}}"),),
                stacked=True,
            ),
            Panel(
                "Sequences put back",
                "none",
                "For want of KV cache, a second: their work is done twice.",
                ((_rate("mtlora_engine_preemptions_total", "pod"), "{{pod}}"),),
            ),
        ),
    ),
    (
        "Adapters",
        (
            Panel(
                "Adapter versions",
                "none",
                "Loaded and failed; failed ones are named in the log.",
                (("max by (state) (mtlora_adapters{$by})", "{{state}}"), ("max(mtlora_tasks{$by})", "tasks")),
                kind="stat",
            ),
            Panel(
                "What became of versions",
                "none",
                "Stages reached within the hour, and stages that were not.",
                (
                    ("sum by (stage) (increase(mtlora_adapter_events_total{$by}[1h]))", "{{stage}}"),
                    ("sum by (stage) (increase(mtlora_adapter_failures_total{$by}[1h]))", "not {{stage}}"),
                ),
            ),
            Panel("To load a version", "s", "With all its slots.", _quantiles("mtlora_adapter_load_seconds")),
            Panel("To serve a new version", "s", "From its discovery.", _quantiles("mtlora_adapter_swap_seconds")),
            Panel(
                "Wait for an adapter",
                "s",
                "Of requests whose adapter was not in the engine.",
                _quantiles("mtlora_adapter_cold_seconds"),
            ),
            Panel(
                "Versions in the engine",
                "none",
                "adapter_slots bounds them.",
                (("max by (pod) (mtlora_adapters_resident{$by})", "{{pod}}"),),
            ),
            Panel(
                "Slots",
                "none",
                "In use, of those a step can use; and tasks that may take one.",
                (
                    ("max by (pod) (mtlora_adapter_slots_in_use{$by})", "in use {{pod}}"),
                    ("max(mtlora_adapter_slots{$by})", "slots"),
                    ("max(mtlora_adapter_slots_registered{$by})", "tasks"),
                ),
            ),
            Panel(
                "Loads and evictions",
                "none",
                "Weights read from disk, versions and tasks that made room for others: a second.",
                (
                    (_rate("mtlora_adapter_weight_loads_total"), "loads"),
                    (_rate("mtlora_adapter_evictions_total"), "versions evicted"),
                    (_rate("mtlora_adapter_slot_evictions_total"), "slots evicted"),
                ),
            ),
            Panel(
                "Weights in memory",
                "bytes",
                "All ranks of a pod together.",
                (("sum by (pod) (mtlora_adapter_resident_bytes{$by})", "{{pod}}"),),
            ),
            Panel(
                "Tasks and adapters of a step",
                "none",
                "Means: how mixed the batches are.",
                ((_mean("mtlora_engine_step_tasks"), "tasks"), (_mean("mtlora_engine_step_adapters"), "adapters")),
            ),
            Panel(
                "Routing entropy",
                "percentunit",
                "1: every expert alike, 0: always one. Needs MTLORA_ROUTING_SAMPLE_STEPS.",
                (
                    (
                        _ratio("mtlora_routing_entropy_ratio_total", "mtlora_routing_sampled_rows_total", "adapter"),
                        "{{adapter}}",
                    ),
                ),
            ),
            Panel(
                "Use of experts",
                "percentunit",
                "Shares of the sampled weight, all adapters together.",
                (
                    (
                        _rate("mtlora_routing_expert_weight_total", "expert")
                        + f" / scalar({_rate('mtlora_routing_expert_weight_total')})",
                        "expert {{expert}}",
                    ),
                ),
                stacked=True,
            ),
        ),
    ),
    (
        "Engine",
        (
            Panel(
                "Steps", "none", "A second, by pod.", ((_rate("mtlora_engine_step_sequences_count", "pod"), "{{pod}}"),)
            ),
            Panel(
                "Prefix cache",
                "percentunit",
                "Prompt tokens found there.",
                (
                    (
                        _ratio("mtlora_engine_prefix_cache_hits_total", "mtlora_engine_prefix_cache_queries_total"),
                        "hits",
                    ),
                ),
            ),
            Panel(
                "Distinct adapters of a step",
                "none",
                "Colour is steps.",
                ((_rate("mtlora_engine_step_adapters_bucket", "le"), "{{le}}"),),
                kind="heatmap",
            ),
            Panel(
                "The server's event loop is late by",
                "s",
                "Above some ten milliseconds the server wants processor time: requests then wait before any other "
                "clock here starts.",
                _quantiles("mtlora_event_loop_delay_seconds"),
                thresholds=((0.25, "red"),),
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana 10 and later import it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}}
        )
        y += 1
        for i, panel in enumerate(row):
            x = i * _WIDTH % _COLUMNS
            panels.append(_panel(panel, x, y + i * _WIDTH // _COLUMNS * _HEIGHT))
        y += -(-len(row) * _WIDTH // _COLUMNS) * _HEIGHT
    for number, each in enumerate(panels, start=1):
        each["id"] = number
    return {
        "uid": "mtlora",
        "title": "mtLoRA server",
        "tags": ["mtlora"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _variable("namespace"), _variable("pod")]},
        "panels": panels,
    }


def _panel(panel: Panel, x: int, y: int) -> dict[str, Any]:
    steps = [{"color": "green", "value": None}, *({"color": c, "value": v} for v, c in panel.thresholds)]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 20 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "thresholdsStyle": {"mode": "line" if panel.thresholds else "off"},
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name"}
    heatmap = panel.kind == "heatmap"
    if heatmap:
        options = {"calculate": False, "yAxis": {"unit": panel.unit}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "gridPos": {"x": x, "y": y, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "expr": expression.replace("$by", _SELECT),
                "legendFormat": legend,
                "format": "heatmap" if heatmap else "time_series",
            }
            for i, (expression, legend) in enumerate(panel.queries)
        ],
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(label: str) -> dict[str, Any]:
    return {
        "name": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "$datasource"},
        "query": f"label_values(mtlora_serving, {label})",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
