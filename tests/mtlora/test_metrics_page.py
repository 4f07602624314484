"""A server's metrics page as a client reads it."""

import math

import pytest

from mtlora.client.metrics_page import MetricsPage, metrics_url

PAGE = """# HELP mtlora_request_seconds From receipt to the end of the answer.
# TYPE mtlora_request_seconds histogram
mtlora_request_seconds_bucket{le="0.1",task="a}} b"} 1
mtlora_request_seconds_bucket{le="0.5",task="a}} b"} 3 # {trace_id="x"} 0.2 1.5
mtlora_request_seconds_bucket{le="+Inf",task="a}} b"} 4
mtlora_request_seconds_bucket{le="0.1",task="c"} 0
mtlora_request_seconds_bucket{le="0.5",task="c"} 0
mtlora_request_seconds_bucket{le="+Inf",task="c"} 0
mtlora_request_seconds_sum{task="c"} 1.5
mtlora_requests_total{method="Generate",task="a",status="OK"} 4
mtlora_requests_total{method="Generate",task="c",status="OK"} 1
mtlora_requests_total{method="Generate",task="d",status="OK"} NaN
mtlora_build_info{version="1.2",backbone="default"} 1.0
process_cpu_seconds_total 12
"""


def test_samples_are_summed_over_labels() -> None:
    page = MetricsPage(PAGE)
    assert page.value("mtlora_requests_total") == 5
    assert page.value("mtlora_requests_total", task="a") == 4
    assert page.value("mtlora_request_seconds_sum") == 1.5
    assert page.value("mtlora_nothing") == 0
    assert page.labels("mtlora_build_info") == {"version": "1.2", "backbone": "default"}
    assert page.buckets("mtlora_request_seconds") == {0.1: 1, 0.5: 3, math.inf: 4}
    assert page.buckets("mtlora_request_seconds", task="c") == {0.1: 0, 0.5: 0, math.inf: 0}


@pytest.mark.parametrize(
    ("given", "url"),
    [("h:9", "http://h:9/metrics"), ("http://h:9/", "http://h:9/metrics"), ("https://h/m", "https://h/m")],
)
def test_an_address_becomes_a_url(given: str, url: str) -> None:
    assert metrics_url(given) == url
