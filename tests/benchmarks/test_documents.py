"""The last line of `make documents`."""

from typing import Any

from benchmarks.engine.documents import Bench, last_line, many_over_few


def row(median: float) -> dict[str, Any]:
    return {"median": median, "min": median, "max": median, "goal": ""}


def test_last_line_has_what_was_measured() -> None:
    rows = {"shared/apart": row(9.13), "shared/vllm-multi-lora": row(41.04)}
    accuracy = {"adapter": 0.876, "backbone_alone": 0.101}
    assert last_line({"rows": rows, "accuracy": accuracy}) == (
        "documents: 25 tasks, shared/apart 9.1, against vllm-multi-lora 41.0, accuracy 0.88, backbone alone 0.10"
    )
    del rows["shared/vllm-multi-lora"]
    assert last_line({"rows": rows, "accuracy": None}) == "documents: 25 tasks, shared/apart 9.1"


class Told:
    """An engine that stores its requests. It takes 2 s, or 1 s for few tasks."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(message)
        seconds = 2.0 if len(set(message["slots"])) == 1000 else 1.0
        return {"seconds": seconds, "tokens": len(message["prompts"]) * message["new_tokens"], "cached": 0}


def test_many_tasks_are_compared_with_as_many_requests_of_few() -> None:
    engine = Told()
    slots = [(f"task-{i}", i, "") for i in range(1000)]
    bench = Bench(engine, None, slots, (), (), 100)  # type: ignore[arg-type]
    assert [many_over_few(bench, number) for number in range(2)] == [0.5, 0.5]
    assert [len(each["slots"]) for each in engine.asked] == [1000] * 4
    assert [len(set(each["slots"])) for each in engine.asked] == [1000, 25, 25, 1000]
    documents = [each["prompts"][0][: each["point"]] for each in engine.asked]
    assert len({tuple(document) for document in documents}) == 4
