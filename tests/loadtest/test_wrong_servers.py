"""The load generator against wrong servers, which lose answers, mix them up or go away."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from mtlora_pb.v1 import inference_pb2 as pb
from mtlora_pb.v1 import inference_pb2_grpc

from loadtest import connection, driver
from loadtest.cli import main
from tests.servicers import serving

Answer = Callable[[pb.GenerateRequest, Any, pb.Summary], Iterator[pb.GenerateStreamResponse]]


@pytest.fixture(autouse=True)
def _short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that got a failure asks again at once."""
    monkeypatch.setattr(driver, "_PAUSE_S", 0.001)


class LyingServer(inference_pb2_grpc.InferenceServicer):
    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.keys: list[str | None] = []
        self.lock = threading.Lock()

    def ListTasks(self, request: pb.ListTasksRequest, context: Any) -> pb.ListTasksResponse:
        if not request.page_token:
            return pb.ListTasksResponse(tasks=[pb.Task(id="navigate", fields=["input"])], next_page_token="2")
        return pb.ListTasksResponse(tasks=[pb.Task(id="sort", fields=["input"])])

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        return pb.GenerateResponse(text="alone", summary=self._summary(request, context))

    def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateStreamResponse]:
        with self.lock:
            self.keys.append(dict(context.invocation_metadata()).get("authorization"))
        yield from self._answer(request, context, self._summary(request, context))

    def _summary(self, request: pb.GenerateRequest, context: Any) -> pb.Summary:
        request_id = dict(context.invocation_metadata()).get("x-request-id", "")
        return pb.Summary(
            request_id=request_id, task_id=request.task_id, finish_reason=pb.FINISH_REASON_STOP, prompt_tokens=3,
            completion_tokens=2,
        )  # fmt: skip


@contextmanager
def lying(answer: Answer) -> Iterator[tuple[str, LyingServer, grpc.Server]]:
    servicer = LyingServer(answer)
    with serving(servicer, inference_pb2_grpc.add_InferenceServicer_to_server) as (address, server):
        yield address, servicer, server


def load(address: str, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    status = main(
        ["run", "--address", address, "--in-flight", "4", "--requests", "20", "--prompt-words", "3", "--out", str(out),
         *flags]
    )  # fmt: skip
    return status, json.loads((out / "result.json").read_text())


def text(request: pb.GenerateRequest, context: Any, summary: pb.Summary) -> Iterator[pb.GenerateStreamResponse]:
    yield pb.GenerateStreamResponse(text=" al")
    yield pb.GenerateStreamResponse(text="one", summary=summary)


def other_task(request: pb.GenerateRequest, context: Any, summary: pb.Summary) -> Iterator[pb.GenerateStreamResponse]:
    summary.task_id = "other"
    yield pb.GenerateStreamResponse(text="x", summary=summary)


def other_request(
    request: pb.GenerateRequest, context: Any, summary: pb.Summary
) -> Iterator[pb.GenerateStreamResponse]:
    summary.request_id += "0"
    yield pb.GenerateStreamResponse(text="x", summary=summary)


def cut(request: pb.GenerateRequest, context: Any, summary: pb.Summary) -> Iterator[pb.GenerateStreamResponse]:
    yield pb.GenerateStreamResponse(text="x")


def no_reason(request: pb.GenerateRequest, context: Any, summary: pb.Summary) -> Iterator[pb.GenerateStreamResponse]:
    summary.finish_reason = pb.FINISH_REASON_UNSPECIFIED
    yield pb.GenerateStreamResponse(text="x", summary=summary)


def error(request: pb.GenerateRequest, context: Any, summary: pb.Summary) -> Iterator[pb.GenerateStreamResponse]:
    yield pb.GenerateStreamResponse(text="x")
    context.abort(grpc.StatusCode.INTERNAL, "broke in the middle")


def changed(request: pb.GenerateRequest, context: Any, summary: pb.Summary) -> Iterator[pb.GenerateStreamResponse]:
    yield pb.GenerateStreamResponse(text="something else", summary=summary)


def test_passes_a_correct_server(tmp_path: Path) -> None:
    with lying(text) as (address, _, _):
        status, found = load(address, tmp_path)
    assert (status, found["failed"], found["wrong"]) == (0, 0, 0)
    assert found["check"]["same_alone"] == 20
    assert found["server"]["tasks"] == 2
    phase = found["phases"][0]
    assert sum(task["offered"] for task in phase["tasks"].values()) == 20
    assert phase["total"]["itl"]["count"] == 20


@pytest.mark.parametrize(
    ("answer", "flaw"),
    [
        (other_task, "for task 'other'"),
        (other_request, "for request"),
        (cut, "without its summary"),
        (no_reason, "why it ended"),
    ],
)
def test_counts_flawed_replies_as_failed(answer: Answer, flaw: str, tmp_path: Path) -> None:
    with lying(answer) as (address, _, _):
        status, found = load(address, tmp_path)
    assert (status, found["failed"]) == (1, 20)
    assert flaw in found["phases"][0]["flaws"][0]


def test_counts_errors_by_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lying(error) as (address, _, _):
        status, found = load(address, tmp_path)
    assert (status, found["failed"]) == (1, 20)
    assert found["phases"][0]["statuses"] == {"INTERNAL": 20}
    assert found["phases"][0]["errors"] == {"INTERNAL": "broke in the middle"}
    assert "the first INTERNAL: broke in the middle\n" in capsys.readouterr().out


def test_answers_that_could_not_be_asked_again_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(_: Any, request: pb.GenerateRequest, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, "the server ended after the last phase")

    monkeypatch.setattr(LyingServer, "Generate", ended)
    with lying(text) as (address, _, _):
        status, found = load(address, tmp_path)
    assert (status, found["failed"], found["wrong"], found["check"]["unchecked"]) == (1, 0, 0, 20)
    assert "not checked: 20 of 20 answers that were to be asked again alone" in capsys.readouterr().out


def test_answer_that_differs_from_the_one_alone_is_wrong(tmp_path: Path) -> None:
    with lying(changed) as (address, _, _):
        status, found = load(address, tmp_path)
        assert (status, found["failed"], found["wrong"]) == (1, 0, 20)
        assert found["check"]["examples"][0]["alone"] == "alone"
        assert load(address, tmp_path, "--check", "reply")[0] == 0


@pytest.mark.parametrize(("flags", "ties", "wrong"), [((), 20, 0), (("--tie", "0.7"), 0, 20), (("--tie", "0"), 0, 20)])
def test_an_answer_is_a_tie_up_to_the_tolerance(
    flags: tuple[str, ...], ties: int, wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's two tokens are 0.8 nats apart."""
    chosen = pb.TokenLogprob(token_id=1, token="alone", logprob=-0.1)
    other = pb.TokenLogprob(token_id=2, token="something", logprob=-0.9)

    def alone(servicer: LyingServer, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        logprobs = [pb.TokenLogprobs(chosen=chosen, top=[chosen, other])]
        return pb.GenerateResponse(text="alone", summary=servicer._summary(request, context), logprobs=logprobs)

    monkeypatch.setattr(LyingServer, "Generate", alone)
    with lying(changed) as (address, _, _):
        status, found = load(address, tmp_path, *flags)
    assert (status, found["check"]["ties"], found["wrong"]) == (int(wrong > 0), ties, wrong)
    assert {example["nats"] for example in found["check"]["examples"]} == ({0.8} if wrong else set())


@pytest.mark.parametrize(
    ("alone", "in_company", "tie"),
    [
        pytest.param(1.25, ("alone", 0.5), True, id="near in company"),
        pytest.param(0.75, ("something", 0.125), True, id="the order changes by rounding"),
        pytest.param(0.75, ("something", 0.5), False, id="the order changes for all in company"),
        pytest.param(1.75, ("alone", 0.5), False, id="company shifts it by more than the tolerance"),
        pytest.param(1.25, ("alone", 1.25), False, id="as far in company"),
        pytest.param(1.25, ("something", 3.0), False, id="the order changes by much"),
        pytest.param(1.25, ("else", 0.1), False, id="a third answer"),
        pytest.param(0.75, ("alone", 1.25), False, id="near alone only"),
        pytest.param(0.25, ("alone", 1.25), True, id="clear alone"),
    ],
)
def test_a_difference_near_the_tolerance_is_measured_again_in_company(
    alone: float, in_company: tuple[str, float], tie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()

    def answer(servicer: LyingServer, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        with servicer.lock:
            asked[request.text] += request.parameters.logprobs > 0
            first, nats = ("alone", alone) if asked[request.text] == 1 else in_company
        other = "something" if first == "alone" else "alone"
        chosen, second = (
            pb.TokenLogprob(token_id=len(token), token=token, logprob=logprob)
            for token, logprob in ((first, -0.5), (other, -0.5 - nats))
        )
        logprobs = [pb.TokenLogprobs(chosen=chosen, top=[chosen, second])]
        return pb.GenerateResponse(text=first, summary=servicer._summary(request, context), logprobs=logprobs)

    monkeypatch.setattr(LyingServer, "Generate", answer)
    with lying(changed) as (address, _, _):
        status, found = load(address, tmp_path, "--requests", "6")
    assert (status, found["check"]["ties"], found["wrong"]) == ((0, 6, 0) if tie else (1, 0, 6))
    again = [len(nats) for nats in found["check"]["measured_again"]]
    assert again == ([] if alone == 0.25 else [1 if in_company[0] == "else" else 9] * 6)


def test_latency_includes_a_stall(tmp_path: Path) -> None:
    """The server stops for a second. Requests due meanwhile are late, although each is answered at once when sent."""
    first: list[float] = []

    def stalling(request: pb.GenerateRequest, context: Any, summary: pb.Summary) -> Iterator[pb.GenerateStreamResponse]:
        first.append(time.monotonic())
        if 1.0 <= (at := time.monotonic() - first[0]) < 2.0:
            time.sleep(2.0 - at)
        yield pb.GenerateStreamResponse(text="alone", summary=summary)

    with lying(stalling) as (address, _, _):
        status = main(
            ["run", "--address", address, "--rate", "30", "--duration", "3", "--warm-up", "0", "--prompt-words", "3",
             "--check", "reply", "--out", str(tmp_path)]
        )  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())["phases"][0]
    assert status == 0
    assert found["total"]["offered"] == pytest.approx(90, abs=30)
    # A third of the requests are due during the stall and wait half a second on average.
    assert found["total"]["e2e"]["p90"] > 0.4
    assert found["total"]["e2e"]["p50"] < 0.2


def test_stops_when_the_server_goes_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lying(text) as (address, _, server):
        threading.Timer(1.5, lambda: server.stop(None)).start()
        status = main(
            ["run", "--address", address, "--rate", "60", "--duration", "30", "--prompt-words", "3", "--warm-up", "0",
             "--out", str(tmp_path)]
        )  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())
    assert status == 1
    assert found["server_gone"]
    assert not found["complete"]
    assert found["phases"][0]["total"]["ok"] > 10
    assert found["phases"][0]["statuses"]["UNAVAILABLE"] >= 50
    assert "did not complete" in capsys.readouterr().out


def test_tenants_send_their_own_keys(tmp_path: Path) -> None:
    (tmp_path / "tenants").write_text("acme one\nbolt two\n")
    with lying(text) as (address, servicer, _):
        status, found = load(address, tmp_path, "--tenants", str(tmp_path / "tenants"), "--tenant-mix", "hot:acme=0.8")
    assert status == 0
    assert set(servicer.keys) == {"Bearer one", "Bearer two"}
    sent = {name: group["offered"] for name, group in found["phases"][0]["tenants"].items()}
    assert sent == {"acme": servicer.keys.count("Bearer one"), "bolt": servicer.keys.count("Bearer two")}
    written = (tmp_path / "result.json").read_text() + (tmp_path / "report.html").read_text()
    assert "Bearer" not in written
    assert '"one"' not in written


def test_makes_unary_calls(tmp_path: Path) -> None:
    with lying(cut) as (address, _, _):
        status, found = load(address, tmp_path, "--unary")
    assert (status, found["phases"][0]["total"]["ok"]) == (0, 20)


def test_keeps_every_outcome_on_request(tmp_path: Path) -> None:
    with lying(text) as (address, servicer, _):
        status, found = load(address, tmp_path, "--check", "reply", "--outcomes")
    assert status == 0
    outcomes = found["phases"][0]["outcomes"]
    assert [each["status"] for each in outcomes] == ["OK"] * 20
    assert all(0 < each["time_to_first_token_s"] <= each["seconds"] for each in outcomes)
    assert found["phases"][0]["total"]["offered"] == len(servicer.keys) == 20
    assert found["phases"][0]["total"]["e2e"]["count"] == 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "navigat"], "no task 'navigat'"),
        (["--task-mix", "hot:sorted"], "no task 'sorted' (in the mix); near: sort"),
        (["--tenants", "nowhere"], "nowhere: cannot be read"),
        (["--metrics", "127.0.0.1:1"], "cannot read the server's metrics"),
        (["--trace", "nowhere"], "exactly one of rate"),
    ],
)
def test_wrong_use_exits_with_a_message(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lying(text) as (address, _, _):
        command = ["run", "--address", address, "--in-flight", "1", "--requests", "1", "--prompt-words", "3"]
        assert main([*command, "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_rejects_a_wrong_trace_before_sending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    command = ["run", "--trace", str(trace), "--prompt-words", "3", "--out", str(tmp_path)]
    with lying(text) as (address, servicer, _):
        trace.write_text('{"at": 0}\n{"at": 1, "task": "sorted"}\n')
        assert main([*command, "--address", address]) == 2
        assert "no task 'sorted' (in the trace); near: sort" in capsys.readouterr().err
        trace.write_text('{"at": 0}\nnonsense\n')
        assert main([*command, "--address", address]) == 2
        assert "line 2: Invalid JSON" in capsys.readouterr().err
        assert servicer.keys == []
        trace.write_text('{"at": 5, "task": "sort"}\n{"at": 5.5, "task": "sort", "input": "b a"}\n{"at": 6}\n')
        assert main([*command, "--address", address, "--speed", "2"]) == 0
    found = json.loads((tmp_path / "result.json").read_text())["phases"][0]
    assert (found["kind"], found["total"]["offered"]) == ("trace", 3)
    assert found["load"] == {"trace": str(trace), "speed": 2, "warm_up_s": 0}
    assert found["window_s"] == pytest.approx(0.5, abs=0.01)


def test_exits_if_there_is_no_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(connection, "_CONNECT_S", 0.5)
    assert main(["run", "--address", "127.0.0.1:1", "--rate", "1", "--out", str(tmp_path)]) == 2
    assert "cannot reach a server at 127.0.0.1:1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
