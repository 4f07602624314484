"""Examples that share a document: exactly what each by itself gives, scheduled together, the document read once."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from mtlora.backbone import identify
from mtlora.checkpoint.format import AdapterManifest
from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.merge.extend import MergeError
from mtlora.merge.merge import merge
from mtlora.model.language import AdaptedModel, new_adapted_model
from mtlora.task import TemplateError
from mtlora.train.config import TrainingConfig, TrainingError
from mtlora.train.data import Encoded, by_document, collate, collate_documents, row_length, schedule
from mtlora.train.losses import answer_loss, balance_loss, batch_loss
from mtlora.train.trainer import Trainer
from tests.factories import CONFIG as SMALL_CONFIG
from tests.factories import random_tensors, task_table, write_random

CONFIG = MtLoRAConfig(r=4, num_experts=3, num_groups=2, blocks="both", activation="task")
SMALL_ADAPTER = SMALL_CONFIG.model_copy(update={"activation": "task"})


def _example(rng: random.Random, document: tuple[int, ...], task_index: int) -> Encoded:
    own, answer = ([rng.randrange(200) for _ in range(rng.randint(1, most))] for most in (9, 4))
    return Encoded(task_index, (*document, *own), tuple(answer), len(document))


def _examples(seed: int, documents: int = 3, tasks: int = 4) -> list[Encoded]:
    rng = random.Random(seed)
    texts = [tuple(rng.randrange(200) for _ in range(rng.randint(1, 30))) for _ in range(documents)]
    found = [_example(rng, text, task) for text in texts for task in range(tasks) if rng.random() < 0.8]
    rng.shuffle(found)
    return found or [_example(rng, texts[0], 0)]


@pytest.fixture
def adapted(tiny_backbone: Path) -> AdaptedModel:
    torch.manual_seed(0)
    adapted = new_adapted_model(tiny_backbone, CONFIG, 4, torch.float64)
    adapted.adapters.double().train()
    for parameter in adapted.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapted


def _plainly(adapted: AdaptedModel, examples: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """(answer loss, balance loss) of a whole sequence an example, with the path from the task's part on."""
    batch = collate(examples)
    L = batch.tokens_BL.shape[1]
    path = [b * L + at for b, e in enumerate(examples) for at in range(e.document_length, len(e))]
    with adapted.adapters.context.use(batch.task_index_E, torch.tensor(path)):
        hidden_BLD = adapted.model.model(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state
    states_AD = hidden_BLD.flatten(0, 1)[batch.answer_rows_A]
    balance = balance_loss(adapted.adapters.mean_routing())
    return answer_loss(states_AD, adapted.model.lm_head, batch.answer_targets_A), balance


@pytest.mark.parametrize("seed", range(4))
def test_a_shared_document_gives_the_plain_losses_and_gradients(adapted: AdaptedModel, seed: int) -> None:
    examples = _examples(seed)
    found = {}
    for way in ("plain", "shared"):
        if way == "plain":
            loss, balance = _plainly(adapted, examples)
        else:
            loss = batch_loss(adapted, collate_documents(examples))
            balance = balance_loss(adapted.adapters.mean_routing())
        gradients = torch.autograd.grad(loss + balance, list(adapted.adapters.parameters()))
        found[way] = [loss, balance, *gradients]
    assert all(gradient.abs().max() > 0 for gradient in found["plain"])
    torch.testing.assert_close(found["shared"], found["plain"], rtol=1e-6, atol=1e-6)


def test_a_batch_reads_each_document_once(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = _examples(1)
    read: list[torch.Size] = []
    reading = AdaptedModel.read

    def record(self: AdaptedModel, tokens_BS: torch.Tensor) -> object:
        read.append(tokens_BS.shape)
        return reading(self, tokens_BS)

    monkeypatch.setattr(AdaptedModel, "read", record)
    batch_loss(adapted, collate_documents(examples))
    assert read == [(len(by_document(examples)), max(e.document_length for e in examples))]


def test_no_gradient_or_statistic_comes_from_the_document(adapted: AdaptedModel) -> None:
    examples = _examples(2)
    batch = collate_documents(examples)
    counted = []
    for block in adapted.adapters.blocks():
        block.register_forward_hook(lambda block, args, out: counted.append(block.routing(args[0]).shape[0]))
    batch_loss(adapted, batch)
    assert set(counted) == {sum(len(e) - e.document_length for e in examples)}


@example(seed=0, batch_size=4, tasks=1, limit=39)  # Two examples of a document, each in a unit of its own.
@given(seed=st.integers(0, 10_000), batch_size=st.integers(1, 9), tasks=st.integers(1, 6), limit=st.integers(8, 90))
def test_the_schedule_keeps_a_documents_examples_together(seed: int, batch_size: int, tasks: int, limit: int) -> None:
    examples = _examples(seed, documents=5, tasks=6)
    batches = schedule(examples, batch_size=batch_size, epochs=2, seed=seed, batch_tokens=limit, document_tasks=tasks)
    assert Counter(i for batch in batches for i in batch) == dict.fromkeys(range(len(examples)), 2)
    for batch in batches:
        chosen = [examples[i] for i in batch]
        rows = [[chosen[i] for i in row] for row in by_document(chosen)]
        assert len(batch) <= batch_size
        assert len(rows) == 1 or len(rows) * max(map(row_length, rows)) <= limit
    read = sum(len(by_document([examples[i] for i in batch])) for batch in batches)
    assert read <= 2 * sum(-(-len(unit) // min(tasks, batch_size)) for unit in by_document(examples))
    assert batches == schedule(
        examples, batch_size=batch_size, epochs=2, seed=seed, batch_tokens=limit, document_tasks=tasks
    )


SMALL = TrainingConfig(
    adapter=CONFIG, suite="documents", tasks=("document_kind", "city", "currency"), examples_per_task=6,
    validation_per_task=1, batch_size=6, document_tasks=3, max_length=1700, epochs=2, learning_rate=1e-2, save_every=2,
    dtype="float32", threads=1,
)  # fmt: skip


def test_a_run_trains_resumes_and_leaves_an_activated_checkpoint(tiny_backbone: Path, tmp_path: Path) -> None:
    whole = Trainer(SMALL, tiny_backbone, tmp_path / "whole")
    assert len(whole.batches) == 6
    assert all(len(by_document([whole.work.examples.train[i] for i in batch])) == 2 for batch in whole.batches)
    manifest = whole.fit()
    assert isinstance(manifest, AdapterManifest)
    assert (manifest.format_version, manifest.config.activation) == (2, "task")
    assert set(manifest.evaluation["adapter"]["tasks"]) == set(SMALL.tasks or ())
    halted = Trainer(SMALL, tiny_backbone, tmp_path / "halted")
    for _ in range(2):
        halted.train_step()
    halted.save()
    resumed = Trainer(SMALL, tiny_backbone, tmp_path / "halted", resume=True)
    resumed.fit()
    for name, tensor in whole.adapted.adapters.state_dict().items():
        assert torch.equal(resumed.adapted.adapters.state_dict()[name], tensor), name


def test_ranks_share_whole_documents(tiny_backbone: Path, tmp_path: Path) -> None:
    trainer = Trainer(SMALL, tiny_backbone, tmp_path / "run")
    whole = [trainer.work.examples.train[i] for i in trainer.batches[0]]
    shares = []
    for rank in range(3):
        trainer.ranks.rank, trainer.ranks.world = rank, 3
        shares.append(trainer.work.share(whole, trainer.ranks))
    assert [counts for _, counts in shares] == [True, True, False]
    assert sorted(map(id, [*shares[0][0], *shares[1][0]])) == sorted(map(id, whole))
    assert not {e.document for e in shares[0][0]} & {e.document for e in shares[1][0]}


def test_refuses_what_an_activated_adapter_cannot_do(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"document_template: expected one, .* 'task', found none in task"):
        Trainer(SMALL.model_copy(update={"suite": "builtin", "tasks": None}), tiny_backbone, tmp_path / "run")
    with pytest.raises(ValidationError, match="gradient_checkpointing: found it with activation 'task'"):
        TrainingConfig.model_validate(SMALL.model_dump() | {"gradient_checkpointing": True})
    write_random(
        tmp_path / "all", backbone=identify(tiny_backbone), config=CONFIG.model_copy(update={"activation": "all"}),
        tensors=random_tensors(CONFIG, identify(tiny_backbone)),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="expected the same adapter config; activation: 'all' there, 'task' here"):
        Trainer(SMALL.model_copy(update={"init_from": str(tmp_path / "all")}), tiny_backbone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_task_without_a_document_part_is_not_merged(tiny_backbone: Path, tmp_path: Path) -> None:
    tasks = task_table(3, document_template="{document}")
    write_random(tmp_path / "a", config=SMALL_ADAPTER, tasks=tasks)
    config = TrainingConfig(adapter=SMALL_ADAPTER, tasks=("navigate",))
    with pytest.raises(TemplateError, match="found none in task 'navigate'"):
        merge(read_checkpoint(tmp_path / "a"), tiny_backbone, tmp_path / "out", config)
    other = config.model_copy(
        update={
            "suite": "documents",
            "tasks": ("city",),
            "adapter": SMALL_ADAPTER.model_copy(update={"activation": "all"}),
        }
    )
    with pytest.raises(MergeError, match="hyper-parameters stay as they are"):
        merge(read_checkpoint(tmp_path / "a"), tiny_backbone, tmp_path / "out", other)
