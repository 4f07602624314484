"""One engine serves many adapters, tasks and bare requests in one batch, whatever happens to their files."""

import json
import shutil
from pathlib import Path

import pytest

from mtlora.backbone import identify
from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE
from mtlora.config import MtLoRAConfig
from tests.engine._engine import lora_manager_of, running_engine, worker_of
from tests.engine._models import make_adapter

CONFIGS = {
    "biased": MtLoRAConfig(r=16, num_experts=8, num_groups=4, blocks="ffn"),
    "attending": MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="attention"),
    "unbiased": MtLoRAConfig(r=4, num_experts=6, num_groups=1, blocks="both", task_bias=False),
}
NUM_TASKS = 3
# Fewer than the registered slots, so that the engine evicts in every step.
MAX_LORAS, MAX_CPU_LORAS = 3, 4
SENTENCES = [
    "The capital of France is",
    "Question: is water wet? Answer:",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "1, 2, 3, 5, 8,",
]


class Serving:
    """A running engine, its registered requests by (adapter, task), and the greedy tokens of some work."""

    def __init__(self, engine, backbone: Path, folder: Path) -> None:
        from mtlora.vllm_plugin.requests import slot_requests

        self.engine = engine
        self.folder = folder
        self.backbone = identify(backbone)
        self.slots = {}
        first_id = 1
        for seed, (name, config) in enumerate(CONFIGS.items()):
            manifest = make_adapter(folder / name, self.backbone, config, num_tasks=NUM_TASKS, seed=seed, size=2.0)
            requests = slot_requests(name, "1", folder / name, manifest, first_id)
            first_id += len(set(requests.values()))
            self.slots |= {(name, task): request for task, request in requests.items()}
        for request in set(self.slots.values()):
            assert engine.llm_engine.add_lora(request)
        keys = [None, *self.slots, None, *reversed(self.slots)]
        self.work = [(SENTENCES[i % len(SENTENCES)], key) for i, key in enumerate(keys)]

    def run(self, work):
        from vllm import SamplingParams

        outputs = self.engine.generate(
            [prompt for prompt, _ in work],
            SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0),
            lora_request=[self.slots.get(key) for _, key in work],
            use_tqdm=False,
        )
        self.cached = [output.num_cached_tokens for output in outputs]
        self.scores = [output.outputs[0].cumulative_logprob for output in outputs]
        return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def serving(short_backbone, tmp_path_factory):
    with running_engine(
        short_backbone,
        dtype="float32",
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
        block_size=32,
        max_loras=MAX_LORAS,
        max_cpu_loras=MAX_CPU_LORAS,
    ) as engine:
        yield Serving(engine, short_backbone, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def one_by_one(serving):
    answers = []
    for item in serving.work:
        serving.engine.reset_prefix_cache()
        answers += serving.run([item])
    return answers


def test_seed_gives_the_same_tokens_when_the_prompt_takes_several_steps(serving):
    from vllm import SamplingParams

    # 16 prompts of 100 tokens do not fit into one step of 512.
    prompts = [{"prompt_token_ids": [20 + i] * 100} for i in range(16)]
    sampling = [SamplingParams(temperature=1.0, max_tokens=6, seed=i, ignore_eos=True) for i in range(16)]

    def tokens(outputs):
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    together = tokens(serving.engine.generate(prompts, sampling, use_tqdm=False))
    alone = [
        tokens(serving.engine.generate([prompt], each, use_tqdm=False))[0]
        for prompt, each in zip(prompts[3:7], sampling[3:7], strict=True)
    ]
    assert together[3:7] == alone
    assert len(set(together)) > 1


def test_mixed_batch_gives_the_answers_of_single_requests(serving, one_by_one):
    assert len({serving.slots[key].lora_int_id for key in serving.slots}) > MAX_CPU_LORAS
    serving.engine.reset_prefix_cache()
    assert serving.run(serving.work) == one_by_one
    bare = {prompt: answer for (prompt, key), answer in zip(serving.work, one_by_one, strict=True) if key is None}
    changed = [answer != bare.get(prompt) for (prompt, _), answer in zip(serving.work, one_by_one, strict=True)]
    assert sum(changed) > len(changed) / 3, "adapters that change no answer test nothing"


def test_prefix_caching_keeps_slots_apart(serving):
    prompt = " ".join(SENTENCES)
    work = [(prompt, key) for key in [None, *serving.slots]]
    fresh = []
    for item in work:
        serving.engine.reset_prefix_cache()
        fresh += serving.run([item])
    serving.engine.reset_prefix_cache()
    cached = []
    for item in work:
        answer = serving.run([item])
        # An adapter without task biases has one slot: its second and third task find the first one's blocks.
        assert bool(serving.cached[0]) == (item[1] in [("unbiased", "t1"), ("unbiased", "t2")])
        cached += answer
    assert cached == fresh
    assert serving.run(work) == fresh
    assert all(serving.cached)
    # Bare, three biased, three attending, one unbiased: a score each.
    assert len({round(score, 3) for score in serving.scores}) == 8


def test_warm_up_run_leaves_the_slots_alone(serving, one_by_one):
    """Idle data-parallel workers make such runs between steps, with ids of real slots."""
    worker_of(serving.engine)._dummy_run(4)
    serving.engine.reset_prefix_cache()
    assert serving.run(serving.work) == one_by_one


@pytest.mark.parametrize("spoil", ["garbage", "gone"])
def test_registered_adapters_outlive_their_files(serving, one_by_one, spoil):
    for name in CONFIGS:
        if spoil == "garbage":
            (serving.folder / name / TENSORS_FILE).write_bytes(b"garbage")
            (serving.folder / name / MANIFEST_FILE).write_bytes(b"garbage")
        else:
            shutil.rmtree(serving.folder / name)
    serving.engine.reset_prefix_cache()
    assert serving.run(serving.work) == one_by_one


def test_task_of_a_known_adapter_needs_neither_registration_nor_files(serving, one_by_one):
    where = next(i for i, (_, key) in enumerate(serving.work) if key == ("biased", "t1"))
    assert not serving.folder.joinpath("biased").exists()
    assert serving.engine.llm_engine.remove_lora(serving.slots["biased", "t1"].lora_int_id)
    serving.engine.reset_prefix_cache()
    assert serving.run([serving.work[where]]) == [one_by_one[where]]


def test_an_unregistered_adapter_is_read_when_first_named(serving, tmp_path):
    from vllm.lora.request import LoRARequest

    make_adapter(tmp_path / "a", serving.backbone, CONFIGS["biased"], num_tasks=NUM_TASKS, seed=0, size=2.0)
    serving.slots["late"] = LoRARequest("late", 60, f"{tmp_path / 'a'}#t0")
    late, registered = serving.run([(SENTENCES[0], "late"), (SENTENCES[0], ("biased", "t0"))])
    assert late == registered
    assert serving.engine.llm_engine.remove_lora(60)
    del serving.slots["late"]


def spoil_tensors(folder):
    (folder / TENSORS_FILE).write_bytes((folder / TENSORS_FILE).read_bytes()[:-8])


def spoil_backbone(folder):
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["backbone"]["weights_fingerprint"] = "0" * 64
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def make_peft(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


BAD = {
    "truncated": (spoil_tensors, "t0", "adapter.safetensors"),
    "other backbone": (spoil_backbone, "t0", "weights_fingerprint"),
    "unknown task": (lambda folder: None, "t9", "no task 't9'.*t0, t1"),
    "peft": (make_peft, None, "PEFT.*MTLORA_PLUGIN"),
    "missing": (shutil.rmtree, None, "adapter.json and adapter.safetensors, found nothing"),
}


@pytest.mark.parametrize("bad", BAD)
def test_refuses_a_bad_adapter_and_lives(serving, one_by_one, bad, tmp_path):
    from vllm.lora.request import LoRARequest

    from mtlora.vllm_plugin.naming import slot_path

    spoil, task, message = BAD[bad]
    make_adapter(tmp_path / "bad", serving.backbone, CONFIGS["biased"])
    spoil(tmp_path / "bad")
    registered = serving.engine.llm_engine.list_loras()
    with pytest.raises(ValueError, match=message):
        serving.engine.llm_engine.add_lora(LoRARequest("bad", 99, slot_path(tmp_path / "bad", task)))
    assert serving.engine.llm_engine.list_loras() == registered
    assert serving.run(serving.work[:3]) == one_by_one[:3]


def test_refuses_a_second_path_for_an_id(serving, tmp_path):
    from vllm.lora.request import LoRARequest

    make_adapter(tmp_path / "other", serving.backbone, CONFIGS["biased"])
    with pytest.raises(ValueError, match="LoRA id 1 stands for"):
        serving.engine.llm_engine.add_lora(LoRARequest("other", 1, str(tmp_path / "other")))


def test_load_inplace_replaces_the_weights_of_a_slot(serving, tmp_path):
    from vllm.lora.request import LoRARequest

    folder, prompt = tmp_path / "a", SENTENCES[2]
    answers = []
    serving.slots["inplace"] = LoRARequest("inplace", 50, str(folder))
    for seed in (1, 2):
        make_adapter(folder, serving.backbone, CONFIGS["biased"], seed=seed, size=1.0)
        serving.engine.llm_engine.add_lora(LoRARequest("inplace", 50, str(folder), load_inplace=seed > 1))
        serving.engine.reset_prefix_cache()
        answers += serving.run([(prompt, "inplace")])
    assert answers[0] != answers[1]
    weights = len(lora_manager_of(serving.engine).store._adapters)
    assert serving.engine.llm_engine.remove_lora(50)
    assert not serving.engine.llm_engine.remove_lora(50)
    assert len(lora_manager_of(serving.engine).store._adapters) == weights - 1
    del serving.slots["inplace"]
