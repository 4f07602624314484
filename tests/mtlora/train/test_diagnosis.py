"""Diagnosis: known routers, gradients and experts give known numbers; every picture is drawn."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtlora.cli import main
from mtlora.config import MtLoRAConfig
from mtlora.model.language import new_adapted_model
from mtlora.suite import load_suite
from mtlora.train.config import TrainingConfig
from mtlora.train.diagnosis import Routing, cosines, routing_by_task, spectra, task_gradients
from mtlora.train.trainer import Trainer

TASKS = ("boolean_expressions", "navigate", "object_counting")


@pytest.fixture
def tasks_and_examples():
    suite = load_suite("builtin")
    tasks = [task for task in suite.tasks if task.id in TASKS]
    # Without working: the last part needs answers of one token.
    examples = {task.id: suite.examples(task.id, "train", 4) for task in tasks}
    return tasks, {task_id: [replace(e, working=None) for e in found] for task_id, found in examples.items()}


def test_routing_follows_task_biases_and_ignores_padding(tiny_backbone: Path, tasks_and_examples) -> None:
    tasks, examples = tasks_and_examples
    config = MtLoRAConfig(r=2, num_experts=4, num_groups=2)
    adapted = new_adapted_model(tiny_backbone, config, len(tasks), torch.float32)
    adapted.adapters.eval()
    with torch.no_grad():
        for block in adapted.adapters.blocks():
            block.lora_route.zero_()
            for t in range(3):
                block.task_bias[t, :, t] = 100.0
    found = routing_by_task(adapted, tasks, examples)
    assert found.tasks == tuple(task.id for task in tasks)
    assert found.blocks == ("0.mlp", "1.mlp")
    expected = torch.eye(4)[:3][:, None, None].expand(3, 2, 2, 4)
    torch.testing.assert_close(found.weights_TMGN, expected)
    torch.testing.assert_close(found.experts_of_a_task(), torch.ones(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.experts_of_all(), torch.full((2,), 3.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.between_tasks(), torch.ones(2), rtol=1e-4, atol=1e-4)
    assert found.between_groups().max() < 1e-5
    # A router that reads the input, so padding would change the result if it counted.
    torch.manual_seed(0)
    with torch.no_grad():
        for block in adapted.adapters.blocks():
            block.task_bias.zero_()
            torch.nn.init.normal_(block.lora_route)
    task = tasks[0]
    together = routing_by_task(adapted, [task], {task.id: examples[task.id]}).weights_TMGN
    alone = [routing_by_task(adapted, [task], {task.id: [e]}).weights_TMGN for e in examples[task.id]]
    lengths = [len(adapted.tokenizer(task.render(e.input))["input_ids"]) for e in examples[task.id]]
    assert len(set(lengths)) > 1
    # Every answer has the same number of tokens, so an example's weight is its prompt's length plus a constant.
    answers = {len(adapted.tokenizer(" " + e.target)["input_ids"]) for e in examples[task.id]}
    assert answers == {1}
    weights = torch.tensor([length + 2.0 for length in lengths])
    mean = (torch.cat(alone) * weights[:, None, None, None]).sum(0) / weights.sum()
    torch.testing.assert_close(together[0], mean, rtol=1e-4, atol=1e-5)


def test_a_known_routing_has_its_numbers_of_experts() -> None:
    weights = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]])
    found = Routing(("a", "b"), ("0.mlp",), weights.unsqueeze(1), torch.full((2, 1), math.log(2)))
    assert found.experts_of_all().item() == pytest.approx(2, rel=1e-4)
    assert found.experts_of_a_token().item() == pytest.approx(2, rel=1e-4)
    assert found.between_tasks().item() == pytest.approx(0, abs=1e-6)
    assert found.between_groups().item() == pytest.approx(1, rel=1e-4)


def test_task_gradients_equal_the_losses_gradients(tiny_backbone: Path, tasks_and_examples) -> None:
    tasks, examples = tasks_and_examples
    torch.manual_seed(0)
    config = MtLoRAConfig(r=2, num_experts=2, num_groups=2)
    adapted = new_adapted_model(tiny_backbone, config, len(tasks), torch.float32)
    adapted.adapters.eval()
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    same = {task.id: examples[tasks[0].id] for task in tasks}
    found = task_gradients(adapted, tasks, examples)
    shared = sum(p.numel() for n, p in adapted.adapters.named_parameters() if not n.endswith("task_bias"))
    assert found.shape == (3, shared)
    cosine = cosines(found)
    torch.testing.assert_close(cosine.diagonal(), torch.ones(3))
    torch.testing.assert_close(cosine, cosine.T)
    assert cosine[0, 1] < 0.999
    with torch.no_grad():
        for block in adapted.adapters.blocks():
            block.task_bias.zero_()
    alike = [task.model_copy(update={"id": t.id}) for t, task in zip(tasks, [tasks[0]] * 3, strict=True)]
    given = {t.id: [type(e)(t.id, e.input, e.target) for e in same[t.id]] for t in alike}
    torch.testing.assert_close(cosines(task_gradients(adapted, alike, given)), torch.ones(3, 3))


def test_spectra_give_the_sigmas_and_overlaps_of_known_experts() -> None:
    B = torch.zeros(2, 2, 8, 2)
    # Block 0: the same expert twice, with one direction. Block 1: two orthogonal experts with two equal directions.
    B[0, :, 0, 0] = 3.0
    B[1, 0, 0, 0] = B[1, 0, 1, 1] = B[1, 1, 2, 0] = B[1, 1, 3, 1] = 2.0
    found = spectra(B)
    torch.testing.assert_close(found.sigma_MNr[0], torch.tensor([[3.0, 0.0], [3.0, 0.0]]))
    torch.testing.assert_close(found.overlap_M, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.effective_rank(), torch.tensor([[1.0, 1.0], [2.0, 2.0]]), rtol=1e-4, atol=1e-4)
    assert spectra(torch.zeros(1, 3, 4, 2)).effective_rank().max() == 0


def test_every_picture_is_drawn(tiny_backbone: Path, tmp_path: Path, capsys) -> None:
    config = TrainingConfig(
        adapter=MtLoRAConfig(r=4, num_experts=3, num_groups=2), tasks=TASKS, examples_per_task=8, validation_per_task=2,
        batch_size=8, validate_every=2, threads=1,
    )  # fmt: skip
    run, out = tmp_path / "run", tmp_path / "plots"
    Trainer(config, tiny_backbone, run).fit()
    torch.use_deterministic_algorithms(False)
    plot = ["plot", str(run), "--out", str(out), "--backbone", str(tiny_backbone), "--examples", "2"]
    assert main(plot) == 0
    names = ("accuracy", "curves", "spectra", "routing", "routing-groups", "experts-in-use", "gradients")
    assert [Path(line).stem for line in capsys.readouterr().out.split()] == list(names)
    for name in names:
        picture = (out / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    # Without its run, a checkpoint has no curves; without a record of its suite, it needs --suite.
    (run / "adapter").rename(tmp_path / "alone")
    plot[1] = str(tmp_path / "alone")
    assert main([*plot, "--only", "curves"]) == 2
    assert "nothing to draw curves from" in capsys.readouterr().err
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "navigate.json").write_text('{"examples": [{"input": "a", "target": "b"}]}')
    assert main([*plot, "--suite", str(folder), "--only", "routing"]) == 2
    assert "lacks the adapter's task boolean_expressions, object_counting" in capsys.readouterr().err
