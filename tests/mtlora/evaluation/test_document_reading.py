"""Evaluation, diagnosis and comparison with an activated adapter: the document is read once, with the plain results."""

from pathlib import Path

import pytest
import torch

from mtlora.checkpoint.format import AdapterManifest, Checkpoint, TaskEntry, format_version
from mtlora.config import MtLoRAConfig
from mtlora.evaluation.generate import Prompt, greedy_tokens
from mtlora.evaluation.lengths import by_document_length
from mtlora.evaluation.likelihood import label_probabilities, likeliest
from mtlora.evaluation.offline import offline_answerer
from mtlora.merge.compare import compare
from mtlora.model.language import AdaptedModel, adapter_tensors
from mtlora.prompt import PromptEncoder
from mtlora.suite import Example
from mtlora.train.diagnosis import routing_by_task
from tests.factories import random_adapted

CONFIG = MtLoRAConfig(r=4, num_experts=3, num_groups=2, blocks="both", activation="task")
TASKS = tuple(
    TaskEntry(
        id=f"task-{i}", description="d", document_template="Text: {document}\n",
        template=f"Question {i}?{' So?' * i}\nA:", max_new_tokens=5 + i, stop=("never",), bias_index=i,
    )
    for i in range(3)
)  # fmt: skip
TEXTS = ("the quick brown fox", "a", "if you follow these steps, you will get there in an hour")
EXAMPLES = [Example(task.id, text, "x") for text in TEXTS for task in TASKS]


@pytest.fixture(scope="module")
def adapted(tiny_backbone: Path) -> AdaptedModel:
    made = random_adapted(tiny_backbone, CONFIG, len(TASKS))
    # Scale attention up, so that the documents' keys and values matter for later tokens.
    for layer in made.model.model.layers:
        layer.self_attn.v_proj.weight.mul_(30)
    return made


def _prompt(adapted: AdaptedModel, task: TaskEntry, text: str) -> Prompt:
    return Prompt(*adapted.prompts.parts(task.parts(text)))


@torch.inference_mode()
def _plain_logits(adapted: AdaptedModel, task: TaskEntry, ids: list[int], start: int) -> torch.Tensor:
    """Logits of one whole sequence, with the path from `start` on."""
    path_P = torch.arange(start, len(ids))
    with adapted.adapters.context.use(torch.tensor([task.bias_index]), path_P):
        logits: torch.Tensor = adapted.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def test_generated_tokens_are_those_of_whole_sequences(adapted: AdaptedModel) -> None:
    """Documents of different lengths in one batch, several tasks of each."""
    tasks = [task for _ in TEXTS for task in TASKS]
    prompts = [_prompt(adapted, task, text) for text in TEXTS for task in TASKS]
    expected = []
    for task, prompt in zip(tasks, prompts, strict=True):
        ids = list(prompt.ids)
        while len(ids) < len(prompt.ids) + task.max_new_tokens:
            ids.append(int(_plain_logits(adapted, task, ids, prompt.document_length)[-1].argmax()))
            if ids[-1] == adapted.tokenizer.eos_token_id:
                ids.pop()
                break
        expected.append(ids[len(prompt.ids) :])
    assert greedy_tokens(adapted, tasks, prompts) == expected
    alone = greedy_tokens(adapted, tasks, prompts, with_adapter=False)
    assert alone != expected
    on_all = [Prompt(prompt.ids) for prompt in prompts]
    assert greedy_tokens(adapted, tasks, on_all) != expected
    assert greedy_tokens(adapted, tasks, on_all, with_adapter=False) == alone


def test_an_answerer_reads_each_document_once(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    reading = AdaptedModel.read

    def record(self: AdaptedModel, tokens_BS: torch.Tensor, **inputs: torch.Tensor) -> object:
        read.append(len(tokens_BS))
        return reading(self, tokens_BS, **inputs)

    monkeypatch.setattr(AdaptedModel, "read", record)
    shuffled = EXAMPLES[::2] + EXAMPLES[1::2]
    answers = offline_answerer(adapted, TASKS)(shuffled)
    assert read == [len(TEXTS)]
    assert dict(zip(shuffled, answers, strict=True)) == dict(
        zip(EXAMPLES, offline_answerer(adapted, TASKS, batch_size=1)(EXAMPLES), strict=True)
    )


def test_likelihoods_are_those_of_whole_sequences(adapted: AdaptedModel) -> None:
    options = ("Yes", "a longer one", "(B)", "No")
    for task, text in zip(TASKS, TEXTS, strict=True):
        prompt = _prompt(adapted, task, text)
        sums = []
        for option in options:
            ids = adapted.prompts.text(f" {option}")
            logits = _plain_logits(adapted, task, [*prompt.ids, *ids], prompt.document_length)
            rows = logits.log_softmax(-1)[len(prompt.ids) - 1 : -1]
            sums.append(sum(float(row[token]) for row, token in zip(rows, ids, strict=True)))
        assert likeliest(adapted, task, prompt, options) == options[sums.index(max(sums))]
        labelled = task.model_copy(update={"allowed_answers": ("yes", "no")})
        first = [adapted.prompts.answer(label)[0] for label in ("yes", "no")]
        logits_V = _plain_logits(adapted, task, list(prompt.ids), prompt.document_length)[-1]
        expected = dict(zip(("yes", "no"), logits_V[first].softmax(-1).tolist(), strict=True))
        assert label_probabilities(adapted, labelled, prompt) == pytest.approx(expected, rel=1e-4)


def test_routing_is_that_of_the_tasks_own_tokens(adapted: AdaptedModel) -> None:
    found = routing_by_task(adapted, TASKS, {task.id: [e for e in EXAMPLES if e.task_id == task.id] for task in TASKS})
    block = next(iter(adapted.adapters.blocks()))  # type: ignore[attr-defined]
    for t, task in enumerate(TASKS):
        weights = []
        handle = block.register_forward_pre_hook(lambda block, args: weights.append(block.routing(args[0])))  # noqa: B023
        for text in TEXTS:
            ids, start, answer = adapted.prompts.example(task, text, "x")
            _plain_logits(adapted, task, [*ids, *answer], start)
        handle.remove()
        torch.testing.assert_close(found.weights_TMGN[t, 0], torch.cat(weights).mean(0), rtol=1e-4, atol=1e-5)


def test_a_comparison_sees_the_tasks_own_tokens(adapted: AdaptedModel, tiny_backbone: Path) -> None:
    tensors = adapter_tensors(adapted.adapters, torch.float32)
    manifest = AdapterManifest(
        format_version=format_version(CONFIG, TASKS), backbone=adapted.backbone, config=CONFIG, tasks=TASKS,
        tensors_sha256="0" * 64,
    )  # fmt: skip
    changed = tensors | {"layers.1.mlp.task_bias": tensors["layers.1.mlp.task_bias"] + torch.eye(3)[:, None, :]}
    same, other = (
        compare(tiny_backbone, Checkpoint(manifest, tensors), Checkpoint(manifest, after), TEXTS)
        for after in (tensors, changed)
    )
    assert same.identical
    assert other.differing > 0
    own = sum(len(adapted.prompts.text(task.template)) for task in TASKS)
    assert same.logits == own * len(TEXTS) * adapted.model.config.vocab_size


def test_accuracy_is_told_by_document_length(adapted: AdaptedModel) -> None:
    tasks = [TASKS[0], TaskEntry(id="plain", description="d")]
    long = "word " * 400
    examples = [Example("task-0", text, "x") for text in ("short", long)] + [Example("plain", long, "x")]
    answers = {"adapter": ["x", "y", "x"], "backbone_alone": ["y", "x", "x"]}
    prompts: PromptEncoder = adapted.prompts
    assert by_document_length(prompts, tasks, examples, answers) == [
        {"tokens": "to 300", "examples": 1, "adapter": 1.0, "backbone_alone": 0.0},
        {"tokens": "301 to 450", "examples": 1, "adapter": 0.0, "backbone_alone": 1.0},
    ]
