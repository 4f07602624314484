"""Makes the Grafana dashboard: `python -m deploy.grafana.dashboard` writes mtlora.json from panels.yaml."""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter

FILE = Path(__file__).with_name("mtlora.json")
PANELS = Path(__file__).with_name("panels.yaml")
_SELECT = 'namespace=~"$namespace", pod=~"$pod"'
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


class Panel(BaseModel):
    """One chart of panels.yaml. queries: PromQL by legend. quantiles: a histogram, instead of queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    unit: str
    tells: str
    kind: str = "timeseries"
    stacked: bool = False
    red_from: int | float | None = None
    quantiles: str | None = None
    queries: dict[str, str] = {}


class Row(BaseModel):
    """Panels that answer one question."""

    row: str
    panels: list[Panel]


def dashboard() -> dict[str, Any]:
    """The dashboard, for Grafana 10 or later."""
    datasource = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    panels: list[dict[str, Any]] = []
    y = 0
    for row in TypeAdapter(list[Row]).validate_python(yaml.safe_load(PANELS.read_text())):
        panels.append(
            {"type": "row", "title": row.row, "collapsed": False, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}}
        )
        y += 1
        for i, panel in enumerate(row.panels):
            x = i * _WIDTH % _COLUMNS
            panels.append(_panel(panel, x, y + i * _WIDTH // _COLUMNS * _HEIGHT))
        y += -(-len(row.panels) * _WIDTH // _COLUMNS) * _HEIGHT
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
        "templating": {"list": [datasource, _variable("namespace"), _variable("pod")]},
        "panels": panels,
    }


def _panel(panel: Panel, x: int, y: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_from is not None:
        steps.append({"color": "red", "value": panel.red_from})
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "fillOpacity": 20 if panel.stacked else 5,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "thresholdsStyle": {"mode": "off" if panel.red_from is None else "line"},
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
        "description": panel.tells,
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
            for i, (legend, expression) in enumerate(_queries(panel).items())
        ],
    }


def _queries(panel: Panel) -> dict[str, str]:
    """PromQL by legend."""
    if panel.quantiles is None:
        return panel.queries
    buckets = f"sum by (le) (rate({panel.quantiles}_bucket{{$by}}[$__rate_interval]))"
    return {f"p{100 * q:g}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.95, 0.99)}


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
