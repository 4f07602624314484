"""Results are kept and reported."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loadtest import LoadTestError, charts, report, result
from loadtest.cli import main
from tests.loadtest.samples import a_result, phase, with_knee


class Page(HTMLParser):
    """Checks that tags nest, and collects what a page would fetch."""

    _VOID = frozenset({"meta", "br", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self._VOID:
            self.open.append(tag)
        self.fetched += [
            value for name, value in attributes if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


@pytest.mark.slow
def test_report_is_self_contained_and_shows_the_result() -> None:
    made = with_knee(a_result(*(phase(rate, latency) for rate, latency in ((5, 0.2), (10, 0.4), (20, 2.0)))))
    made["in_process"] = {
        "ratio": 0.968,
        "loops": [
            {"name": "full", "in_flight": 96, "unary": True, "ratio": 0.968, "ratio_min": 0.95, "ratio_max": 0.98},
            {"name": "streams", "in_flight": 96, "unary": False, "ratio": 0.911, "ratio_min": 0.9, "ratio_max": 0.92},
        ],
        "rounds": [
            {"loop": "streams", "end_to_end_per_second": 27.0, "in_process_per_second": 30.0, "ratio": 0.9},
            {"loop": "full", "end_to_end_per_second": 29.0, "in_process_per_second": 30.0, "ratio": 0.967},
        ],
    }  # fmt: skip
    made["check"] = {"how": "alone", "exact": 9, "same_alone": 4, "ties": 1, "wrong": 1, "unchecked": 0,
                     "examples": [{"task": "sort", "answer": "<b>", "alone": "c", "target": "d",
                                   "nats": 1.25}]}  # fmt: skip
    made["wrong"] = 1
    text = report.render(made)
    page = read_page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert page.tags.count("svg") >= 4
    assert "1 answered wrongly" in page.text
    assert f"{made['knee']['offered_per_second']:.1f}/s" in page.text
    assert "0.97" in page.text
    assert "0.911" in page.text
    assert "1.25" in page.text
    assert "<b>" in page.text
    for name in ("sort", "count", "(other)", "acme", "bolt"):
        assert name in page.text


def test_reports_a_run_without_phases() -> None:
    made = a_result() | {"complete": False}
    assert "did not run to its end" in read_page(report.render(made)).text


def test_picture_shows_the_most_asked_names_and_the_rest_together() -> None:
    one = phase(20, 0.2)["tasks"]["sort"]
    groups = {f"task-{i:03}": one | {"offered": 1000 - i} for i in range(300)}
    rows = charts.top_rows(groups)
    assert len(rows) == charts.TOP + 1
    assert rows[0][0] == "task-000"
    assert rows[-1][0] == "(other)"
    assert rows[-1][1]["offered"] == sum(1000 - i for i in range(charts.TOP, 300))
    assert rows[-1][1]["e2e"]["count"] == one["e2e"]["count"] * (300 - charts.TOP)
    assert "task-000" in charts.by_name(groups, "task")


def test_reads_the_result_it_wrote(tmp_path: Path) -> None:
    made = a_result(phase(5, 0.2))
    result.write(made, tmp_path / "new" / "result.json")
    assert result.read(tmp_path / "new" / "result.json") == json.loads(json.dumps(made))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["result.json"]
    for wrong in ("{", "[]", '{"format": 1}', '{"format": 99, "phases": []}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(LoadTestError, match="result"):
            result.read(tmp_path / "wrong.json")


def test_command_writes_the_report_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result.write(a_result(phase(20, 0.4)), tmp_path / "result.json")
    assert main(["report", str(tmp_path / "result.json"), "--html", str(tmp_path / "r.html")]) == 0
    assert "Load test" in (tmp_path / "r.html").read_text()
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
