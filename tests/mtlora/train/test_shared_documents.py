"""Examples that share a document: exactly what each by itself gives, scheduled together, the document read once."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.config import MtLoRAConfig
from mtlora.model import AdaptedModel, new_adapted_model
from mtlora.train.data import Encoded, by_document, collate, collate_documents, row_length, schedule
from mtlora.train.losses import answer_loss, balance_loss, batch_loss

CONFIG = MtLoRAConfig(r=4, num_experts=3, num_groups=2, blocks="both", activation="task")


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


@given(seed=st.integers(0, 10_000), batch_size=st.integers(1, 9), tasks=st.integers(1, 6), limit=st.integers(8, 90))
@settings(deadline=None)
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
