"""The load generator against a real server and engine."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest.cli import main
from server.cli.process import ServerProcess

# Random words, for the tasks of the tests' random adapters.
REQUESTS = ("--tasks", "count_words,echo,open", "--prompt-words", "4-12")


def test_open_loop_agrees_with_the_servers_metrics(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["run", "--address", server.address, "--metrics", server.metrics, "--rate", "5", "--duration", "3",
         "--warm-up", "1", "--check", "reply", "--out", str(tmp_path), *REQUESTS]
    )  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())
    assert status == 0, capsys.readouterr().out
    assert (found["failed"], found["wrong"], found["complete"]) == (0, 0, True)
    phase = found["phases"][0]
    assert phase["offered_per_second"] == pytest.approx(5, abs=3)
    assert set(phase["tasks"]) == {"count_words", "echo", "open"}
    assert phase["total"]["completion_tokens"] == sum(t["completion_tokens"] for t in phase["tasks"].values())
    # Both saw every request of the phase. Medians lie within one bucket of each other; the tail of so few requests
    # may reach the generator late, never early.
    assert phase["generator"]["held_up"]["count"] > 10
    assert phase["server"]["loop_delay"] is not None
    agreement = phase["server"]["agreement"]
    sent = sum(phase["statuses"].values())
    for latency in ("ttft", "e2e"):
        assert agreement[latency]["observed"] == {"generator": sent, "server": sent}
        rows = agreement[latency]["quantiles"]
        assert rows["p50"]["buckets_apart"] <= 1, rows
        assert all(row["generator"] >= row["server_from"] * 0.98 for row in rows.values()), rows
    assert found["server"]["build"]["backbone"]
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_finds_the_knee_within_max_rate(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["knee", "--address", server.address, "--start-rate", "2", "--max-rate", "4", "--step", "2", "--warm-up", "0.5",
         "--slo-ttft", "30", "--slo-e2e", "60", "--check", "reply", "--out", str(tmp_path), *REQUESTS]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    found = json.loads((tmp_path / "result.json").read_text())["knee"]
    assert [step["rate"] for step in found["steps"]] == [2, 4]
    assert not found["bounded"]
    assert printed.count("holds") == 2
    assert "or more" in printed


def test_checks_answers_against_targets(server: ServerProcess, tmp_path: Path) -> None:
    """A random adapter gives no exact answer, which is wrong only with --check exact."""
    suite = tmp_path / "suite"
    suite.mkdir()
    examples = [{"input": f"How many words has number {i}?", "target": "five"} for i in range(100)]
    (suite / "count_words.json").write_text(json.dumps({"examples": examples}))
    command = ["run", "--address", server.address, "--suite", str(suite), "--in-flight", "4", "--requests", "8"]
    for check, status in (("alone", 0), ("exact", 1)):
        assert main([*command, "--check", check, "--out", str(tmp_path)]) == status
        found = json.loads((tmp_path / "result.json").read_text())
        assert found["phases"][0]["accuracy"] == 0
        assert found["wrong"] == (8 if check == "exact" else 0)


def test_ctrl_c_keeps_the_results_so_far(server: ServerProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from loadtest.cli import main; sys.exit(main(sys.argv[1:]))", "run"]
    flags = ["--address", server.address, "--in-flight", "2", "--duration", "60", "--warm-up", "0", *REQUESTS]
    process = subprocess.Popen([*command, *flags, "--out", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    # The first line comes once requests are under way.
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "did not complete" in printed
    found = json.loads((tmp_path / "result.json").read_text())
    assert not found["complete"]
    assert found["failed"] == 0
    assert found["phases"][0]["total"]["ok"] > 0
    assert (tmp_path / "report.html").exists()
