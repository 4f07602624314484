"""Activated adapters: a request never reads cached blocks that another adapter computed."""

import json
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.backbone import identify
from mtlora.checkpoint.format import MANIFEST_FILE
from mtlora.config import MtLoRAConfig
from mtlora.vllm_plugin.activation import _check, masked
from mtlora.vllm_plugin.leases import Leases
from mtlora.vllm_plugin.naming import ACTIVATION_KEY as KEY
from mtlora.vllm_plugin.naming import LEASE_KEY
from tests.engine._engine import noted_preemptions, running_engine
from tests.engine._models import VOCABULARY, HuggingFace, all_logprobs, make_adapter, make_model

ADAPTERS = 3


@pytest.fixture(scope="module", autouse=True)
def _plugin() -> None:
    from mtlora.vllm_plugin import register

    register()


@dataclass
class Sequence:
    """A request; `kv` is what its positions must hold, computed without a cache."""

    request: Any
    adapter: int
    kv: list[int] = field(default_factory=list)
    computed: int = 0
    # Positions that were read since it was admitted.
    read: int = 0
    wanted: int = 0


def state(before: int, token: int, row: int) -> int:
    """A stand-in for a position's keys and values, which depend on all tokens and rows up to it."""
    return hash((before, token, row))


class Engine:
    """vLLM's own cache manager and block pool under a small scheduler; a step computes `state` instead of a model.

    What a sequence reads from the physical blocks is compared with `Sequence.kv`: all of it once it is admitted, what
    is new in each step, and all of it again at its end.
    """

    def __init__(self, block_size: int, num_blocks: int, budget: int) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, 4096, scheduler_block_size=block_size, hash_block_size=block_size)
        self.hasher = get_request_block_hasher(block_size, sha256)
        self.block_size, self.budget = block_size, budget
        self.memory: dict[tuple[int, int], int] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.cached = self.preemptions = 0

    def add(
        self,
        name: str,
        prompt: list[int],
        adapter: int,
        point: int,
        salt: str | None,
        new_tokens: int,
        lease: tuple[float, int] | None = None,
    ) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.v1.request import Request

        slot = LoRARequest(f"a{adapter}", adapter, f"/a{adapter}") if adapter else None
        extra = ({KEY: point} if point else {}) | ({LEASE_KEY: list(lease)} if lease else {})
        parameters = SamplingParams(max_tokens=new_tokens, extra_args=extra or None)
        request = Request(name, prompt, parameters, None, lora_request=slot, cache_salt=salt, block_hasher=self.hasher)
        self.waiting.append(Sequence(request, adapter, wanted=len(prompt) + new_tokens))

    def step(self) -> None:
        self.manager.new_step_starts()
        left, scheduled = self.budget, []
        before = self.preemptions
        for each in list(self.running):
            if each not in self.running:
                continue
            count = min(left, each.request.num_tokens - each.computed)
            while count and self.manager.allocate_slots(each.request, count) is None:
                # Preempt the sequence at the end of the running ones: it is not yet scheduled in this step.
                victim = self.running[-1]
                self.preempt(victim)
                if victim is each:
                    count = 0
            if count:
                left -= count
                scheduled.append((each, count))
        while self.waiting and left and self.preemptions == before:
            each = self.waiting[0]
            blocks, found, _ = self.manager.get_computed_blocks(each.request)
            count = min(left, each.request.num_tokens - found)
            if self.manager.allocate_slots(each.request, count, found, blocks) is None:
                break
            self.cached += found
            each.computed = each.request.num_computed_tokens = found
            each.read = 0
            self.running.append(self.waiting.pop(0))
            left -= count
            scheduled.append((each, count))
        self.compute(scheduled)

    def preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self.manager.free(victim.request)
        self.running.remove(victim)
        victim.computed = victim.request.num_computed_tokens = 0
        self.waiting.insert(0, victim)

    def compute(self, scheduled: list[tuple[Sequence, int]]) -> None:
        from mtlora.vllm_plugin.activation import point_of

        counts = np.array([count for _, count in scheduled])
        computed = np.array([each.computed for each, _ in scheduled])
        points = {
            i: point_of(each.request.sampling_params, each.request.num_prompt_tokens)
            for i, (each, _) in enumerate(scheduled)
        }
        slots = [each.adapter for each, count in scheduled for _ in range(count)]
        rows = iter(masked(slots, counts, computed, points))
        # Write all of a step's keys and values before reading any, as each layer does.
        for each, count in scheduled:
            for position in range(each.computed, each.computed + count):
                before = self.at(each, position - 1) if position else 0
                self.memory[self.place(each, position)] = state(
                    before, each.request.all_token_ids[position], next(rows)
                )
        for each, count in scheduled:
            each.computed = each.request.num_computed_tokens = each.computed + count
            self.check(each)
            if each.computed == each.request.num_tokens:
                if each.computed == each.wanted:
                    each.read = 0
                    self.check(each)
                    self.manager.free(each.request)
                    self.running.remove(each)
                else:
                    # As in a model, the token depends on the positions read.
                    each.request.append_output_token_ids(self.at(each, each.computed - 1) % 2)

    def check(self, each: Sequence) -> None:
        from mtlora.vllm_plugin.activation import point_of

        point = point_of(each.request.sampling_params, each.request.num_prompt_tokens)
        for position in range(len(each.kv), each.computed):
            row = each.adapter if position >= point else 0
            before = each.kv[-1] if each.kv else 0
            each.kv.append(state(before, each.request.all_token_ids[position], row))
        blocks = self.manager.get_block_ids(each.request.request_id)[0]
        read = [self.memory[blocks[i // self.block_size], i % self.block_size] for i in range(each.read, each.computed)]
        assert read == each.kv[each.read : each.computed]
        each.read = each.computed

    def place(self, each: Sequence, position: int) -> tuple[int, int]:
        blocks = self.manager.get_block_ids(each.request.request_id)[0]
        return blocks[position // self.block_size], position % self.block_size

    def at(self, each: Sequence, position: int) -> int:
        return self.memory[self.place(each, position)]


def ask(engine: Engine, name: str, document: list[int], salt: str | None = None, lease: Any = None) -> int:
    """Ask of a document, alone; gives the tokens that were cached."""
    before = engine.cached
    engine.add(name, [*document, 1, 0], 1, len(document), salt, 1, lease)
    while engine.waiting or engine.running:
        engine.step()
    return engine.cached - before


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 16, 32, 64, 128]))
def test_no_block_is_read_by_another_than_it_was_written_for(seed: int, block_size: int) -> None:
    engine = mixed_load(seed, block_size)
    assert not engine.running


def mixed_load(seed: int, block_size: int) -> Engine:
    """Requests about few documents, of few tokens so that they are alike, in a cache that holds few of them."""
    rng = random.Random(seed)
    longest = 4 * block_size
    documents = [[rng.randrange(2) for _ in range(rng.randint(1, longest))] for _ in range(2)]
    documents.append(documents[0][: len(documents[0]) // 2])
    engine = Engine(block_size, num_blocks=rng.randint(8, 20), budget=rng.choice([7, block_size, 3 * block_size]))
    total = rng.randint(4, 10)
    for i in range(total):
        document = rng.choice(documents)
        prompt = [*document, *(rng.randrange(2) for _ in range(rng.randint(1, block_size)))]
        # Adapters may act on every token; a client may also set points inside the document or after the prompt.
        point = rng.choice([0, len(document), len(document), len(document), rng.randrange(2 * len(prompt))])
        salt = rng.choice([None, None, "one", "two"])
        lease = rng.choice([None, (1e9, 10**6), (1e9, 3 * block_size), (0.0, 10**6)])
        engine.add(
            f"{i}", prompt, rng.randrange(ADAPTERS), point, salt, new_tokens=rng.randint(1, 2 * block_size), lease=lease
        )
        if rng.random() < 0.5:
            engine.step()
        if engine.running and rng.random() < 0.2:
            engine.preempt(engine.running[-1])
    for _ in range(5000):
        if not engine.running and not engine.waiting:
            break
        engine.step()
    assert not engine.waiting
    while engine.manager._mtlora_leases.give_way():
        pass
    assert engine.manager.block_pool.get_num_free_blocks() == engine.manager.block_pool.num_gpu_blocks - 1
    return engine


def test_the_load_shares_blocks_and_preempts() -> None:
    engines = [mixed_load(seed, 16) for seed in range(10)]
    assert sum(engine.cached for engine in engines) > 500
    assert sum(engine.preemptions for engine in engines) > 5


@pytest.mark.parametrize("fault", ["keys", "rows"])
def test_the_load_finds_blocks_of_another_adapter(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one of the plugin's two parts disabled, the test above must fail."""
    from vllm.v1.core import kv_cache_utils

    if fault == "keys":
        keyed = kv_cache_utils.generate_block_hash_extra_keys

        def one_block_too_many(request: Any, start: int, end: int, mm: int) -> Any:
            return keyed(request, start, end - 8, mm)

        monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", one_block_too_many)
    else:
        monkeypatch.setattr(f"{__name__}.masked", lambda slots, *_: tuple(slots))
    with pytest.raises(AssertionError):
        any(mixed_load(seed, 16) is None for seed in range(20))


def test_salts_stay_in_the_keys() -> None:
    engine = Engine(16, 20, 512)
    found = [ask(engine, name, [1] * 48, salt) for name, salt in (("one", "a"), ("two", "b"), ("three", "a"))]
    assert found == [0, 0, 48]


def filled(engine: Engine, name: str) -> None:
    """Send other traffic that fills the cache."""
    size = engine.block_size * (engine.manager.block_pool.num_gpu_blocks - 1)
    ask(engine, name, random.Random(name).choices((0, 1), k=size - 4))


@pytest.mark.parametrize("leased", [False, True])
def test_a_leased_document_outlives_other_traffic(leased: bool) -> None:
    """In the blocks of a server as it comes, a gibibyte, a document asked again after 600 other requests."""
    engine = Engine(32, 1456, 2048)
    document = [1] * 1000
    ask(engine, "first", document, "a", (60.0, 8192) if leased else None)
    for i in range(600):
        ask(engine, f"other {i}", random.Random(i).choices((0, 1), k=120))
    assert ask(engine, "again", document, "a") == (992 if leased else 0)


def test_a_request_as_large_as_the_cache_ends_leases_and_no_other_request() -> None:
    engine = Engine(16, 20, 512)
    document = [1] * 48
    ask(engine, "first", document, "a", (60.0, 64))
    filled(engine, "large")
    assert engine.preemptions == 0
    assert ask(engine, "again", document, "a") == 0


def test_leases_stay_within_a_tenants_tokens_and_half_of_the_cache() -> None:
    engine = Engine(16, 41, 512)
    documents = [[*map(int, f"{i:03b}"), *[1] * 45] for i in range(8)]
    leases = engine.manager._mtlora_leases = Leases(engine.manager, lambda: clock[0])
    clock = [0.0]
    for i in range(4):
        ask(engine, f"a{i}", documents[i], "a", (60.0, 100))
    assert [lease.salt for lease in leases._held.values()] == ["a", "a"]
    ask(engine, "too large", [1] * 128, "a", (60.0, 100))
    assert len(leases._held) == 2
    for i in range(8):
        ask(engine, f"b{i}", documents[i], "b", (60.0, 1000))
    assert [lease.salt for lease in leases._held.values()] == ["b"] * 6
    assert sum(len(lease.blocks) for lease in leases._held.values()) <= 20
    clock[0] = 61.0
    ask(engine, "c", documents[0], "c", (60.0, 100))
    assert [lease.salt for lease in leases._held.values()] == ["c"]
    assert engine.manager.reset_prefix_cache()
    assert engine.manager.block_pool.get_num_free_blocks() == 40


def test_second_model_runner_leaves_the_same_rows_bare() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.gpu.lora_utils import LoraState

    from mtlora.vllm_plugin.activation import _leave_rows_bare_in_v2

    class Runner:
        def __init__(self) -> None:
            self.lora_state = LoraState(4)
            self.req_states = SimpleNamespace(num_computed_tokens_np=np.zeros(4, dtype=np.int32))

        def add_requests(self, scheduler_output: Any) -> None:
            for i, new in enumerate(scheduler_output.scheduled_new_reqs):
                self.lora_state.add_request(new.req_id, i, LoRARequest("a", i + 1, "/a"))

    stock = LoraState.make_lora_inputs, LoraState.remove_request
    _leave_rows_bare_in_v2(Runner)
    try:
        runner = Runner()
        new = [
            SimpleNamespace(
                req_id=f"r{i}", prompt_len=9, sampling_params=SimpleNamespace(extra_args=point and {KEY: point})
            )
            for i, point in enumerate((5, None, 20))
        ]
        runner.add_requests(SimpleNamespace(scheduled_new_reqs=new))
        ids, places, counts = ["r2", "r0", "r1"], np.array([2, 0, 1]), np.array([4, 3, 2])

        def rows() -> Any:
            return runner.lora_state.make_lora_inputs(ids, places, counts)[1]

        assert rows() == (0, 0, 0, 0, 0, 0, 0, 2, 2)
        runner.req_states.num_computed_tokens_np[:3] = [4, 0, 8]
        assert rows() == (0, 3, 3, 3, 0, 1, 1, 2, 2)
        runner.lora_state.remove_request("r0")
        assert runner.lora_state._mtlora_points == {"r2": 9}
    finally:
        LoraState.make_lora_inputs, LoraState.remove_request = stock


@pytest.mark.parametrize(("manifest", "refused"), [({"activation": "task"}, True), ({}, False), (None, False)])
def test_an_adapter_that_needs_a_point_is_refused_without(manifest: Any, refused: bool, tmp_path: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    if manifest is not None:
        (tmp_path / MANIFEST_FILE).write_text(json.dumps({"config": manifest}))
    adapter = SimpleNamespace(lora_name="a", lora_path=f"{tmp_path}#t")
    _check(adapter, {KEY: 3}, 3)
    refusal = pytest.raises(VLLMValidationError, match="found none for a, whose activation is 'task'")
    with refusal if refused else nullcontext():
        _check(adapter, None, 3)


@pytest.mark.parametrize("lease", [[1], [1, -1], "1, 2", [1, "2"], [True, 1]])
def test_a_wrong_lease_is_refused(lease: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="mtlora_lease: found"):
        _check(SimpleNamespace(lora_path="absent"), {KEY: 0, LEASE_KEY: lease}, 3)


@pytest.mark.parametrize("adapter", [None, SimpleNamespace(lora_path="absent")])
@pytest.mark.parametrize(
    "extra",
    [{KEY: "x"}, {KEY: -1}, {KEY: 4}, {KEY: [1]}, {KEY: 2.0}, {KEY: True}, {LEASE_KEY: 5}, {KEY: 1, LEASE_KEY: [1]}],
)
def test_wrong_arguments_are_refused_with_and_without_an_adapter(
    adapter: Any, extra: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from mtlora.vllm_plugin.activation import check_requests

    def processed(self: Any, extra_args: Any) -> Any:
        parameters = SimpleNamespace(extra_args=extra_args)
        return SimpleNamespace(lora_request=adapter, sampling_params=parameters, prompt_token_ids=[1, 2, 3])

    monkeypatch.setattr(InputProcessor, "process_inputs", processed)
    check_requests()
    for fine in (None, {"other": "x"}, {KEY: 3, LEASE_KEY: [1, 2.5]}):
        InputProcessor.process_inputs(None, fine)
    with pytest.raises(VLLMValidationError, match=r"mtlora_[a-z]*: found"):
        InputProcessor.process_inputs(None, extra)


CONFIG = MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="both")
# The smallest that vLLM has on CPUs.
BLOCK = 32


class Serving:
    """A small engine with room for few sequences, two adapters, and one tokens-and-scores call."""

    def __init__(self, engine: Any, slots: list[Any]) -> None:
        self.engine, self.slots = engine, slots

    def run(
        self, work: list[tuple[list[int], int, int | None]], new_tokens: int = 6, *, fresh: bool = False
    ) -> list[Any]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=VOCABULARY, detokenize=False,
                skip_reading_prefix_cache=fresh, extra_args=None if point is None else {KEY: point},
            )
            for _, _, point in work
        ]  # fmt: skip
        return self.engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _, _ in work],
            parameters,
            lora_request=[self.slots[adapter] for _, adapter, _ in work],
            use_tqdm=False,
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def serving(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from mtlora.vllm_plugin.requests import slot_requests

    folder, slots = tmp_path_factory.mktemp("adapters"), [None]
    for seed in (1, 2):
        manifest = make_adapter(folder / f"{seed}", identify(model), CONFIG, num_tasks=1, seed=seed)
        slots += set(slot_requests(f"{seed}", "1", folder / f"{seed}", manifest, seed).values())
    with running_engine(
        model, dtype="float32", enable_prefix_caching=True, block_size=BLOCK, max_num_batched_tokens=48,
        num_gpu_blocks_override=12, max_logprobs=VOCABULARY,
    ) as engine:  # fmt: skip
        for slot in filter(None, slots):
            engine.llm_engine.add_lora(slot)
        yield Serving(engine, slots)


def scores(output: Any) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary for each new token."""
    return all_logprobs(output.outputs[0].logprobs)


def test_engine_answers_as_one_without_prefix_cache(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random mixes in a cache of 11 blocks: chunks of 48 tokens, hits, and preemptions."""
    rng = random.Random(0)
    documents = [[rng.randrange(3, VOCABULARY) for _ in range(size)] for size in (90, 60)]
    work: list[tuple[list[int], int, int | None]] = []
    for _ in range(16):
        document = rng.choice(documents)
        point = rng.choice([None, len(document), len(document), rng.randrange(len(document))])
        work.append(
            ([*document, *(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 6)))], rng.randrange(3), point)
        )
    preempted = noted_preemptions(serving.engine, monkeypatch)
    mixed = serving.run(work, 24)
    assert preempted
    assert sum(output.num_cached_tokens for output in mixed) > 8 * BLOCK
    for item, output in zip(work, mixed, strict=True):
        (alone,) = serving.run([item], 24, fresh=True)
        assert alone.num_cached_tokens == 0
        torch.testing.assert_close(scores(output), scores(alone), rtol=1e-4, atol=1e-4)


def test_document_is_computed_once_though_its_tasks_arrive_together(serving: Serving) -> None:
    """The first computes it in several steps; the others wait for it, and share every whole block."""
    rng = random.Random(1)
    document = [rng.randrange(3, VOCABULARY) for _ in range(100)]
    work = [([*document, 5 + i, 7], 1 + i % 2, len(document)) for i in range(10)]
    cached = [output.num_cached_tokens for output in serving.run(work)]
    assert cached == [0] + [96] * 9


def test_path_acts_from_the_point_on(serving: Serving, model: Any) -> None:
    """The document's keys and values are the bare backbone's, and all later tokens have the adapter's path."""
    hugging_face = HuggingFace(model)
    prompt, point = [3 + i % 80 for i in range(40)], 25
    (output,) = serving.run([(prompt, 1, point)], fresh=True)
    tokens = list(output.outputs[0].token_ids)
    folder, task = serving.slots[1].lora_path.split("#")
    with torch.inference_mode():
        before = hugging_face.model(torch.tensor([prompt[:point]]), use_cache=True).past_key_values
    whole = hugging_face.model.forward
    hugging_face.model.forward = lambda ids: whole(ids, past_key_values=before)
    expected = hugging_face.logprobs(prompt[point:] + tokens[:-1], Path(folder), task)
    torch.testing.assert_close(scores(output), expected[len(prompt) - point - 1 :], rtol=1e-3, atol=1e-3)
    (plain,) = serving.run([(prompt, 1, None)], fresh=True)
    assert (scores(plain)[0] - scores(output)[0]).abs().max() > 0.05


@pytest.mark.parametrize(("point", "adapter"), [(41, 0), ("3", 1)])
def test_a_wrong_point_is_refused(serving: Serving, point: Any, adapter: int) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=f"{KEY}: found .*; allowed: 0 to 40"):
        serving.run([([5] * 40, adapter, point)])
