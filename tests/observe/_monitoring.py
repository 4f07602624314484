"""Prometheus with the shipped rules, an Alertmanager, and what it sends: an hour of theirs is a minute here."""

import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks.harness.ports import free_port
from deploy.grafana.dashboard import dashboard
from deploy.manifests import RULES

# By which factor times are shorter than in the rules.
SCALE = 60
SCRAPE_S, SCRAPE_TIMEOUT_S = 0.5, 0.4
# Seconds after which hanging calls fail.
_START_S = 120.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"\[(\d+)([smhd])\]")
ALERTMANAGER = "prometheus-alertmanager"
NEEDED = ("prometheus", ALERTMANAGER)


def missing() -> list[str]:
    """Programs, Debian packages of the same names, that are not installed."""
    return [name for name in NEEDED if not shutil.which(name)]


def scaled_rules() -> dict[str, Any]:
    """rules.yaml with every window, interval and wait divided."""
    rules: dict[str, Any] = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        group["interval"] = _scaled(group.get("interval", "30s"))
        for rule in group["rules"]:
            rule["expr"] = scaled(rule["expr"])
            if "for" in rule:
                rule["for"] = _scaled(rule["for"])
    return rules


def rules(kind: str) -> Iterator[dict[str, Any]]:
    """The scaled rules of one kind, `record` or `alert`."""
    return (rule for group in scaled_rules()["groups"] for rule in group["rules"] if kind in rule)


def scaled(expression: str) -> str:
    """PromQL with every window divided."""
    return _WINDOW.sub(lambda found: f"[{_scaled(found[0][1:-1])}]", expression)


def _scaled(duration: str) -> str:
    return f"{round(1000 * int(duration[:-1]) * _UNITS[duration[-1]] / SCALE)}ms"


def dashboard_queries() -> list[str]:
    """Every query of the dashboard as Grafana would send it, for all namespaces and pods."""
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    filled = (each.replace("$namespace", ".*").replace("$pod", ".*") for each in found)
    return [scaled(each.replace("$__rate_interval", "5m").replace("$__range", "1h")) for each in filled]


class Monitoring:
    """Prometheus and an Alertmanager, which tells this process of alerts. target: HOST:PORT of a server's metrics."""

    def __init__(self, folder: Path, target: str) -> None:
        self._folder, self._target = folder, target
        self.address = f"127.0.0.1:{free_port()}"
        self._alertmanager = f"127.0.0.1:{free_port()}"
        # By alert: when it first came.
        self.fired: dict[str, float] = {}
        self._running = ExitStack()

    def __enter__(self) -> Self:
        hook = ThreadingHTTPServer(("127.0.0.1", 0), self._hook())
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        self._running.callback(hook.shutdown)
        self._write("alertmanager.yml", {
            "route": {"receiver": "test", "group_by": ["..."], "group_wait": "100ms", "group_interval": "1s"},
            "receivers": [{"name": "test", "webhook_configs": [{"url": f"http://127.0.0.1:{hook.server_port}/"}]}],
        })  # fmt: skip
        self._write("rules.yml", scaled_rules())
        self._write("prometheus.yml", {
            "global": {
                "scrape_interval": f"{round(1000 * SCRAPE_S)}ms",
                "scrape_timeout": f"{round(1000 * SCRAPE_TIMEOUT_S)}ms",
                # Rules read only scrapes that have ended: a later query would find a sample that came after them.
                "rule_query_offset": f"{round(1000 * SCRAPE_TIMEOUT_S) + 50}ms",
            },
            "rule_files": ["rules.yml"],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [self._alertmanager]}]}]},
            "scrape_configs": [{
                "job_name": "mtlora-metrics",
                "static_configs": [{"targets": [self._target], "labels": {"namespace": "mtlora", "pod": "mtlora-0"}}],
            }],
        })  # fmt: skip
        # Start it before Prometheus: an alert that cannot be sent waits for the next interval.
        self._start(
            self._alertmanager, ALERTMANAGER, f"--config.file={self._folder}/alertmanager.yml",
            f"--storage.path={self._folder}/alertmanager",
            f"--web.listen-address={self._alertmanager}", "--cluster.listen-address=",
        )  # fmt: skip
        self._start(
            self.address, "prometheus", f"--config.file={self._folder}/prometheus.yml",
            f"--storage.tsdb.path={self._folder}/prometheus",
            f"--web.listen-address={self.address}", f"--rules.alert.resend-delay={_scaled('1m')}",
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """The series of an instant query."""
        asked = {"query": expression} | ({"time": f"{at:.3f}"} if at else {})
        return self._ask("query", asked)

    def ever(self, expression: str, since: float) -> bool:
        """Whether a query had a value at any time since then."""
        asked = {"query": expression, "start": f"{since:.3f}", "end": f"{time.time():.3f}", "step": "2s"}
        return bool(self._ask("query_range", asked))

    def wrong_records(self, wanted: Collection[str], seconds: float) -> list[str]:
        """The wrong recorded series, by name. Waits up to `seconds` for all of them to be right.

        Each needs a series, and each series its expression's value at the moment of its last sample.
        """
        until = time.monotonic() + seconds
        while (found := list(self._wrong_records(wanted))) and time.monotonic() < until:
            time.sleep(SCRAPE_S)
        return found

    def _wrong_records(self, wanted: Collection[str]) -> Iterator[str]:
        for rule in rules("record"):
            recorded = self.query(f"{rule['record']}[3s]")
            if not recorded and rule["record"] in wanted:
                yield f"{rule['record']}: recorded nothing"
            for series in recorded:
                at, value = series["values"][-1]
                labels = {name: text for name, text in series["metric"].items() if name != "__name__"}
                found = [each["value"][1] for each in self.query(rule["expr"], at) if each["metric"] == labels]
                if len(found) != 1 or not _equal(float(found[0]), float(value)):
                    yield f"{rule['record']} {labels}: recorded {value}, found {found}"

    def wait_for(self, alert: str, seconds: float) -> bool:
        """Whether an alert has come, or comes within so many seconds."""
        until = time.monotonic() + seconds
        while alert not in self.fired and time.monotonic() < until:
            time.sleep(0.2)
        return alert in self.fired

    def _ask(self, kind: str, asked: dict[str, str]) -> list[dict[str, Any]]:
        url = f"http://{self.address}/api/v1/{kind}?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=30) as reply:
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
            return found

    def _write(self, name: str, content: dict[str, Any]) -> None:
        (self._folder / name).write_text(yaml.safe_dump(content))

    def _start(self, address: str, *command: str) -> None:
        """Start a program and wait until it is ready. Raises RuntimeError with the last line of its log."""
        path = self._folder / f"{command[0]}.log"
        log = self._running.enter_context(path.open("wb"))
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._running.callback(process.wait, 30)
        self._running.callback(process.terminate)
        until = time.monotonic() + _START_S
        while not _answers(f"http://{address}/-/ready"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} does not start: {path.read_text().rstrip().rpartition(chr(10))[2]}")
            time.sleep(0.1)

    def _hook(self) -> type[BaseHTTPRequestHandler]:
        fired = self.fired

        class Hook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                for alert in json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]:
                    if alert["status"] == "firing":
                        fired.setdefault(alert["labels"]["alertname"], time.time())
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        return Hook


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-9)
