"""Reads a server's metrics page with prometheus-client's parser."""

import math
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Self


class MetricsPage:
    """One reading of a page in Prometheus' text format. `samples` has (labels, value) by sample name."""

    def __init__(self, text: str) -> None:
        # Import here: most clients read no metrics.
        from prometheus_client.parser import text_string_to_metric_families

        self.samples: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples.setdefault(sample.name, []).append((sample.labels, float(sample.value)))

    @classmethod
    def fetch(cls, address: str, timeout_s: float = 5.0) -> Self:
        """Read the page at `HOST:PORT` or a URL. Blocks. Raises OSError, or ValueError for a page in another format."""
        with urllib.request.urlopen(metrics_url(address), timeout=timeout_s) as reply:
            return cls(reply.read().decode())

    def value(self, name: str, **labels: str) -> float:
        """The sum of a sample's finite values over all label sets that contain `labels`; 0 if there is none."""
        series = self.samples.get(name, ())
        return math.fsum(value for found, value in series if labels.items() <= found.items() and math.isfinite(value))

    def labels(self, name: str) -> Mapping[str, str]:
        """The labels of a sample's first series, such as those of `mtlora_build_info`; empty if there is none."""
        series = self.samples.get(name)
        return series[0][0] if series else {}

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """A histogram's cumulative counts by upper bound, ascending, summed over all other labels."""
        counts: dict[float, float] = {}
        for found, value in self.samples.get(f"{name}_bucket", ()):
            if labels.items() <= found.items():
                bound = float(found["le"])
                counts[bound] = counts.get(bound, 0.0) + value
        return dict(sorted(counts.items()))


def metrics_url(address: str) -> str:
    """The URL of a metrics page; `address` is `HOST:PORT` or a URL. Adds `/metrics` if there is no path."""
    url = address if "//" in address else f"http://{address}"
    return url if urllib.parse.urlparse(url).path.strip("/") else f"{url.rstrip('/')}/metrics"
