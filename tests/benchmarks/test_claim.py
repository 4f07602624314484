"""The claim's tables from results of runs, and its cells."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claim import __main__ as command
from benchmarks.claim import runs
from benchmarks.claim.cells import LOWER, UPPER, Cells
from benchmarks.claim.decisions import decide
from benchmarks.claim.methods import METHODS
from benchmarks.claim.report import decided, markdown, summarise, write_claim
from benchmarks.claim.results import compare, keep, restore
from benchmarks.claim.runs import BATCH, RATES, SMOKE, Cell, Claim, Size
from mtlora.train.config import TrainingConfig
from tests.benchmarks.claim_results import result

DOC = Path(__file__).parents[2] / "docs" / "claim.md"


def _steps(config: TrainingConfig) -> int:
    assert isinstance(config.examples_per_task, int)
    assert config.max_steps is not None
    return min(config.max_steps, config.epochs * -(-config.examples_per_task * len(config.tasks or ()) // BATCH))


def _claim(tmp_path: Path, size: Size) -> Claim:
    return Claim(tmp_path, tmp_path, size, 2)


def _cells(claim: Claim, rate_of: Callable[[str], float] = lambda _: 7e-4) -> list[Cell]:
    return [cell for decisive in (True, False) for cell in claim.cells(rate_of, decisive)]


def test_recovery_lies_between_the_bounds_of_the_same_tasks(tmp_path: Path) -> None:
    tasks = ("a", "b")
    results = [result("upper", UPPER, 0.9, (task,), seed) for seed in (0, 1) for task in tasks]
    for seed in (0, 1):
        results.append(result("told", LOWER, 0.5, tasks, seed))
        results.append(result("told", "LoRA q,v", 0.7, tasks, seed))
    results.append(result("shared", "LoRA q,v", 0.6, tasks, 0))
    results.append(result("maps-4-words", "block", 0.3, tuple("abcd"), 0))
    rows = {(row["part"], row["name"]): row for row in summarise(Cells(results))}
    mean, low, high = rows["told", "LoRA q,v"]["recovery"]
    assert mean == pytest.approx(0.5)
    assert low < 0.5 < high
    assert rows["told", LOWER]["recovery"][0] == 0
    # Without its lower bound, a part has only accuracies.
    assert "recovery" not in rows["shared", "LoRA q,v"]
    assert rows["shared", "LoRA q,v"]["accuracy"][0] == pytest.approx(0.6)
    text = markdown(list(rows.values()))
    assert "| LoRA q,v | 1,000 | 0.0007 | 0.700" in text
    assert f"| {UPPER} | | | 0.900" in text
    assert "| the most frequent word of each figure | | | 0.350 |" in text
    write_claim(results, ["told, block, 25 tasks, seed 2: diverged"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"claim.json", "claim.md", "claim.png", "recovery.png"}
    report = json.loads((tmp_path / "claim.json").read_text())
    assert len(report["decisions"]) == 14
    written = (tmp_path / "claim.md").read_text()
    assert decided(report["decisions"]) in written
    assert "| undecided |" in written
    assert written.endswith("### diverged\n\n- told, block, 25 tasks, seed 2: diverged\n")


def test_every_cell_is_a_configuration_that_training_takes(tmp_path: Path) -> None:
    for size in (SMOKE, Size()):
        cells = _cells(_claim(tmp_path, size))
        assert len({(part, name, config.tasks, config.seed) for part, name, config in cells}) == len(cells)
        assert {_steps(config) for _, name, config in cells if name != UPPER} == {size.steps}
        assert {_steps(config) for _, name, config in cells if name == UPPER} == {size.single_steps}
    parts = {part for part, _, _ in cells}
    assert {"upper", "told", "shared", "maps-4-own", "maps-64-words"} <= parts
    told = [
        name for part, name, config in cells if part == "told" and config.seed == 0 and len(config.tasks or ()) == 25
    ]
    assert set(told) == {LOWER, *METHODS}
    assert not any("task bias" in name for part, name, _ in cells if part == "shared")


def test_steps_and_pictures_are_the_same_whatever_the_number_of_tasks_or_maps(tmp_path: Path) -> None:
    claim = _claim(tmp_path, Size())
    cells = _cells(claim)
    # The number of images per step is constant too: no epoch ends with a smaller batch.
    assert {config.examples_per_task for _, _, config in cells} == {192}
    assert 192 % BATCH == 0
    assert {_steps(config) for name in METHODS for config in claim.trials(name, 2e-3)} == {360}
    assert {_steps(config) for config in claim.trials(UPPER, 2e-3)} == {120}
    # The cost stated in the documentation.
    trained = sum(_steps(config) for _, name, config in cells if name != LOWER)
    tried = sum(_steps(config) for name in (UPPER, *METHODS) for rate in RATES for config in claim.trials(name, rate))
    assert f"{trained + tried:,} steps" in DOC.read_text()


def test_the_first_seed_decides_before_another_starts(tmp_path: Path) -> None:
    cells = _cells(_claim(tmp_path, Size()))
    seeds = [config.seed for _, _, config in cells]
    first = cells[: seeds.index(1)]
    assert len(first) < 0.3 * len(cells)
    found = [result(part, name, 0.9 if part == "upper" else 0.5 if name == LOWER else 0.7, config.tasks or (), 0)
             for part, name, config in first]  # fmt: skip
    assert all(each["seeds"] == [0] and each["value"] is not None for each in decide(Cells(found)))
    # The tables of tasks come before the maps.
    tables = [part for part, _, _ in first]
    assert max(tables.index(part) for part in ("upper", "shared", "told")) < min(
        i for i, part in enumerate(tables) if part.startswith("maps")
    )


def test_what_part_is_run_changes_no_other_cell(tmp_path: Path) -> None:
    """A folder has one configuration, so that a complete run can use a partial run's results."""
    configs: dict[Path, TrainingConfig] = {}
    for size, scale in (
        (Size(), 1.0), (Size(methods=("block",)), 1.0), (Size(counts=(5,)), 1.0), (Size(seeds=(2,)), 1.0),
        (Size(rates=(2e-4,)), 0.5), (Size(maps=(64,)), 1.0),
    ):  # fmt: skip
        claim = _claim(tmp_path, size)

        def rate_of(name: str, claim: Claim = claim, scale: float = scale) -> float:
            return 7e-4 if name == LOWER else scale * 7e-4

        cells = _cells(claim, rate_of)
        for name in (UPPER, *size.methods):
            cells += [("rates", name, config) for rate in size.rates for config in claim.trials(name, rate)]
        for part, name, config in cells:
            assert configs.setdefault(claim.run_of(part, name, config).folder, config) == config
    assert len({config.learning_rate for path, config in configs.items() if "linear-heads" in str(path)}) == 1


def test_a_rate_that_diverges_is_not_chosen_and_a_cell_that_does_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def do(run: Any, backbone: Path, settings: dict[str, Any]) -> dict[str, Any]:
        about = {"num_tasks": run.num_tasks, "seed": run.config.seed}
        asked.append(settings["split"])
        if run.config.learning_rate == 2e-3 or (settings["split"] == "test" and run.name == "block"):
            return {**about, "error": "loss is nan", "diverged": True}
        return {**about, "mean_accuracy": 0.1 + run.config.learning_rate}

    written: list[Any] = []
    monkeypatch.setattr(runs, "do", do)
    monkeypatch.setattr(runs, "write_claim", lambda *each: written.append(each))
    (tmp_path / "claim.md").write_text("")
    size = Size(counts=(5,), seeds=(0,), maps=(), methods=("LoRA q,v", "block"))
    claim = _claim(tmp_path, size)
    claim.run()
    assert {claim._rates[name] for name in (UPPER, "LoRA q,v", "block")} == {7e-4}
    # Each rate is tried once: of the upper bound, on five tasks.
    assert asked.count("validation") == 3 * (5 + 1 + 1)
    results, diverged, _ = written[-1]
    assert {each["name"] for each in results} == {UPPER, LOWER, "LoRA q,v"}
    assert diverged == [f"{part}, block, 5 tasks, seed 0: diverged, loss is nan" for part in ("shared", "told")]
    # Without training, only existing results are used, and a method without its trials has no cells.
    monkeypatch.setattr(runs, "do", lambda *each: pytest.fail("trained"))
    monkeypatch.setattr(runs, "read_result", lambda run, *each, **_: None)
    Claim(tmp_path, tmp_path, size, 2, train=False).run()
    assert written[-1][:2] == ([], [])
    monkeypatch.setattr(runs, "do", lambda *each: {"error": "another process trains there"})
    with pytest.raises(SystemExit, match="another process trains there"):
        claim.run()


def test_a_rate_chosen_before_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def do(run: Any, *_: Any) -> dict[str, Any]:
        made.append(run)
        return {"mean_accuracy": 0.5}

    monkeypatch.setattr(runs, "do", do)
    monkeypatch.setattr(runs, "write_claim", lambda *_: None)
    (tmp_path / "claim.md").write_text("")
    size = Size(counts=(5,), seeds=(0,), maps=(), methods=("LoRA q,v",))
    Claim(tmp_path, tmp_path, size, 1, chosen={"LoRA q,v": 2e-3, UPPER: 2e-4}).run()
    assert {run.config.learning_rate for run in made if run.name == "LoRA q,v"} == {2e-3}
    assert {run.config.learning_rate for run in made if run.name == UPPER} == {2e-4}
    assert not any("rates" in run.folder.parts for run in made)


@pytest.mark.parametrize("value", ["LoRA=1e-3", "LoRA q,v", "LoRA q,v=much"])
def test_refuses_a_rate_of_no_method_or_no_number(value: str) -> None:
    with pytest.raises(SystemExit):
        command.main(["--rate", value, "--report"])


def test_finished_cells_go_on_in_another_folder(tmp_path: Path) -> None:
    results = {
        "told/LoRA-qv-0.002/5-tasks/seed-0": {"mean_accuracy": 0.5},
        "told/block-0.002/5-tasks/seed-0": {"error": "loss is nan", "diverged": True},
        "told/heads-0.002/5-tasks/seed-0": {"error": "the disk is full"},
    }
    for folder, about in results.items():
        (tmp_path / "here" / folder).mkdir(parents=True)
        (tmp_path / "here" / folder / "result.json").write_text(json.dumps(about))
    keep(tmp_path / "here", tmp_path / "kept.jsonl")
    own = tmp_path / "there/told/LoRA-qv-0.002/5-tasks/seed-0/result.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"mean_accuracy": 0.6}')
    restore(tmp_path / "kept.jsonl", tmp_path / "there")
    found = {
        str(file.parent.relative_to(tmp_path / "there")): json.loads(file.read_text())
        for file in (tmp_path / "there").rglob("result.json")
    }
    # Failed cells run again, and existing results stay.
    del results["told/heads-0.002/5-tasks/seed-0"]
    assert found == results | {"told/LoRA-qv-0.002/5-tasks/seed-0": {"mean_accuracy": 0.6}}


def test_smoke_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Path, Size]] = []

    class Spy(Claim):
        def run(self) -> None:
            made.append((self.out, self.size))

    monkeypatch.setattr(command, "Claim", Spy)
    monkeypatch.setattr(command, "resolve", Path)
    monkeypatch.setattr(command, "restore", lambda *_: None)
    for arguments in (["--smoke"], [], ["--smoke", "--out", "mine"]):
        command.main(arguments)
    assert made == [(Path("out/claim-smoke"), SMOKE), (Path("out/claim"), Size()), (Path("mine"), SMOKE)]


def test_anew_starts_from_nothing_and_compares_with_the_kept_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {"told/a": {"mean_accuracy": 0.5}, "told/b": {"diverged": True}, "told/c": {"mean_accuracy": 0.9}}
    kept = "".join(json.dumps({"folder": folder, "result": result}) + "\n" for folder, result in cells.items())
    (tmp_path / "kept.jsonl").write_text(kept)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "KEPT", tmp_path / "kept.jsonl")
    monkeypatch.setattr(command, "resolve", Path)
    monkeypatch.setattr(Claim, "run", lambda claim: keep_two(claim.out))

    def keep_two(out: Path) -> None:
        assert not list(out.rglob("result.json"))
        for folder, accuracy in (("told/a", 0.525), ("told/b", 0.125)):
            (out / folder).mkdir(parents=True)
            (out / folder / "result.json").write_text(json.dumps({"mean_accuracy": accuracy}))

    command.main(["--anew"])
    assert capsys.readouterr().out.splitlines() == [
        "",
        "| cell | kept | here | difference |",
        "| --- | --- | --- | --- |",
        "| told/a | 0.500 | 0.525 | +0.025 |",
        "| told/b | 0.000 | 0.125 | +0.125 |",
        "",
        "2 cells: mean difference +0.075, largest +0.125",
    ]
    assert (tmp_path / "out/claim-anew/told/a/result.json").exists()
    assert compare(tmp_path / "elsewhere", tmp_path / "kept.jsonl") == ""
    for other in (["--keep"], ["--smoke"], ["--out", "out/claim"]):
        with pytest.raises(SystemExit):
            command.main(["--anew", *other])
    assert "found it with --keep, --smoke or --out" in capsys.readouterr().err
