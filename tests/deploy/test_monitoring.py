"""Rules, alerts, dashboard and autoscaler name existing metrics and work."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from mtlora_pb.v1 import inference_pb2
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric

from deploy import manifests
from deploy.grafana import dashboard
from deploy.prometheus import record
from server.engine import EngineFailure
from server.telemetry.metrics import Metrics
from server.telemetry.routers import GAUGES

PROMETHEUS = manifests.RULES.parent
NAME = re.compile(r"\bmtlora[_:][a-zA-Z0-9_:]*[a-zA-Z0-9_]")
SUFFIXES_OF_COUNTERS = re.compile("_total$|_bucket$")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (a Debian package of that name)"
)


def families() -> list[Metric]:
    return list(Metrics().registry.collect())


def served() -> set[str]:
    return {family.name + suffix for family in families() for suffix in SUFFIXES[family.type]}


def rules() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(manifests.RULES.read_text())["groups"] for rule in group["rules"]]


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard.dashboard()["panels"] for target in panel.get("targets", ())]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def names_in(text: str) -> set[str]:
    return set(NAME.findall(text))


def test_rules_name_existing_metrics() -> None:
    known = served() | recorded()
    for rule in rules():
        assert names_in(rule["expr"]) <= known
        assert names_in(rule["expr"])
    in_texts = names_in(" ".join(text for rule in rules() for text in rule.get("annotations", {}).values()))
    # Texts name metrics with or without the suffix.
    assert in_texts <= known | {family.name for family in families()}


@pytest.mark.slow
def test_dashboard_names_existing_metrics() -> None:
    assert len(queries()) > 40
    for expression in queries():
        assert names_in(expression), expression
        assert names_in(expression) <= served() | recorded()


def test_every_recorded_series_is_on_the_dashboard() -> None:
    assert recorded() - names_in(" ".join(queries())) == set()


def test_every_metric_is_on_the_dashboard_or_in_a_rule() -> None:
    """Except metrics for routers, because the same figures exist under the server's own names."""
    text = dashboard.text() + manifests.RULES.read_text()
    used = names_in(text)
    unused = {f.name for f in families() if not any(name.startswith(f.name) for name in used)}
    assert unused == GAUGES.keys()


def test_autoscaler_names_existing_metrics() -> None:
    base = manifests.FOLDER / "kubernetes" / "base"
    scaler = yaml.safe_load((base / "horizontalpodautoscaler.yaml").read_text())
    asked = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert asked <= served()
    assert asked <= names_in((PROMETHEUS / "adapter-values.yaml").read_text())


def test_expressions_name_existing_labels() -> None:
    labels = {label for each in Metrics().labels.values() for label in each}
    # Labels of the scrape and of histograms.
    labels |= {"namespace", "pod", "job", "le"}
    for expression in [*(rule["expr"] for rule in rules()), *queries()]:
        grouped = [
            name for group in re.findall(r"(?:by|on) ?\(([^)]*)\)", expression) for name in re.split(r",\s*", group)
        ]
        matched = re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", expression)
        assert {*grouped, *matched} - {""} <= labels, expression


def test_rules_and_dashboard_count_every_call_that_an_engine_answers() -> None:
    expressions = [*(rule["expr"] for rule in rules()), *queries()]
    selectors = {found for each in expressions for found in re.findall(r'method=~"([^"]*)"', each)}
    (selector,) = selectors
    names = {method.name for method in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods}
    asking = names - {"ListTasks", "GetTask"}
    items = {"GenerateBatchItem", "AnalyzeTask", "ClassifyItem", "ScoreItem"}
    assert [each for each in (*asking, *items, "ModelInfer") if not re.fullmatch(selector, each)] == []
    others = {"ListTasks", "GetTask", "List", "Load", "Upload", "Read", "Check", "ServerLive", "ModelReady"}
    assert [each for each in others if re.fullmatch(selector, each)] == []


def test_dashboard_file_is_up_to_date() -> None:
    assert dashboard.FILE.read_text() == dashboard.text()


def test_dashboard_has_its_rows_and_no_overlaps() -> None:
    made = dashboard.dashboard()
    rows = [panel["title"] for panel in made["panels"] if panel["type"] == "row"]
    assert rows == ["Is it well?", "Tenants", "Latency", "Capacity", "Adapters", "Engine"]
    places = [tuple(panel["gridPos"].values()) for panel in made["panels"]]
    cells = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells)), "panels overlap"


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in rules() if "alert" in rule]
    assert len(names) == len(set(names))


def test_every_alert_has_a_runbook() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert len(alerts) >= 10
    for alert in alerts:
        assert len(alert["annotations"]["runbook"]) > 40
        assert alert["labels"]["severity"] in ("critical", "warning", "info")


def test_every_alert_is_tested() -> None:
    tested = (PROMETHEUS / "rules_test.yaml").read_text()
    assert [rule["alert"] for rule in rules() if "alert" in rule and f'alertname="{rule["alert"]}"' not in tested] == []


def test_rules_name_the_job_of_the_scrape() -> None:
    """Without a `jobLabel`, the Prometheus operator names it after the Service that the ServiceMonitor selects."""
    base = manifests.FOLDER / "kubernetes" / "base"
    monitor = yaml.safe_load((base / "servicemonitor.yaml").read_text())["spec"]
    assert "jobLabel" not in monitor
    services = yaml.safe_load_all((base / "services.yaml").read_text())
    wanted = monitor["selector"]["matchLabels"].items()
    found = {each["metadata"]["name"] for each in services if wanted <= each["metadata"]["labels"].items()}
    assert found == {job for rule in rules() for job in re.findall(r'job="([^"]*)"', rule["expr"])}


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yaml"), ("test", "rules", "rules_test.yaml")])
def test_rules_pass_promtool(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_on_what_an_overloaded_server_exported(tmp_path: Path) -> None:
    """Uses the series recorded by `deploy/prometheus/record.py`, repeated for twenty minutes."""
    recorded = yaml.safe_load(record.FILE.read_text())
    repeats = 20 * 60 // (recorded["interval_s"] * len(recorded["series"]["mtlora_serving"]))
    series = []
    for name, values in recorded["series"].items():
        metric, _, labels = name.partition("{")
        grows = values[-1] + (values[-1] - values[0]) / (len(values) - 1) if SUFFIXES_OF_COUNTERS.search(metric) else 0
        went_on = " ".join(str(value + repeat * grows) for repeat in range(repeats) for value in values)
        series.append({"series": f'{metric}{{namespace="m",pod="a",{labels or "}"}', "values": went_on})
    fire = ("MtloraQueueGrows", "MtloraErrorBudgetBurnsFast", "MtloraFirstTokenSlow", "MtloraRequestsShed")
    tests = [fires_once(alert, "19m") for alert in fire]
    interval = f"{recorded['interval_s']}s"
    promtool_tests(tmp_path, [{"interval": interval, "input_series": series, "promql_expr_test": tests}])


@needs_promtool
def test_alerts_fire_on_the_first_failures_of_a_server(tmp_path: Path) -> None:
    """One refused write of the audit log, and an engine lost in each way, of a server that had none before."""
    metrics = Metrics()
    pages = [samples(metrics)]
    metrics.record_accounting_failure("audit")
    for reason in get_args(get_type_hints(EngineFailure)["kind"]):
        metrics.record_engine_restart(reason)
    pages += 4 * [samples(metrics)]
    series = [
        {"series": name, "values": " ".join(str(page.get(name, "_")) for page in pages)}
        for name in pages[-1]
        if name.startswith(("mtlora_accounting_failures_total", "mtlora_engine_restarts_total"))
    ]
    tests = [fires_once(alert, "2m") for alert in ("MtloraAccountingFails", "MtloraEngineRestarts")]
    promtool_tests(tmp_path, [{"interval": "30s", "input_series": series, "promql_expr_test": tests}])


def samples(metrics: Metrics) -> dict[str, float]:
    """A metrics page as Prometheus stores it of a pod, by name and labels."""
    found = {}
    for sample in (sample for family in metrics.registry.collect() for sample in family.samples):
        labels = ",".join(f'{key}="{value}"' for key, value in (sample.labels | {"namespace": "m", "pod": "a"}).items())
        found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def fires_once(alert: str, at: str) -> dict[str, Any]:
    """promtool's test that an alert fires then, with one set of labels."""
    query = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})'
    return {"expr": query, "eval_time": at, "exp_samples": [{"labels": "{}", "value": 1}]}


def promtool_tests(folder: Path, tests: list[dict[str, Any]]) -> None:
    """Run tests of the rules in promtool's form."""
    path = folder / "test.yaml"
    written = {"rule_files": [str(manifests.RULES)], "evaluation_interval": "30s", "tests": tests}
    path.write_text(yaml.safe_dump(written))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_recorded_server_ran_full_and_let_few_sequences_wait_in_its_engine() -> None:
    series = yaml.safe_load(record.FILE.read_text())["series"]
    assert max(series["mtlora_engine_running_sequences"]) == 64
    assert max(series["mtlora_engine_waiting_sequences"]) <= 8
    assert min(series["mtlora_requests_queued"]) > 90


@needs_promtool
def test_dashboard_queries_are_valid_promql(tmp_path: Path) -> None:
    written = [{"record": f"r:{i}", "expr": e.replace("$__rate_interval", "5m")} for i, e in enumerate(queries())]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": written}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_metrics_page_passes_promtool() -> None:
    metrics = Metrics()
    metrics.record_request("Generate", "one", "a", "OK", 1, 1)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(metrics.registry), capture_output=True
    )
    complaints = [line for line in done.stderr.decode().splitlines() if "error" in line.lower()]
    assert done.returncode in (0, 3), done.stderr.decode()
    assert complaints == []
