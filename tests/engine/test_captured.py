"""vLLM's own dispatchers and LoRA mixin drive captured graphs, as both of its model runners do, without a card.

A graph is recorded by `Graph` and replayed in the interpreter. The managers, the store, the step and the kernels are
the real ones, on the CPU's memory.

Shape suffixes: T rows of the batch, D hidden size.
"""

import contextlib
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from benchmarks.ops.mapping import mapping_variants, processor_seconds, runner_over
from mtlora.backbone import BackboneIdentity
from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.ops import triton_gpu  # these tests run the interpreter, which makes them slow ones
from mtlora.ops.table import AdapterTable
from mtlora.ops.tuning import KernelConfig
from tests.engine._models import make_adapter, path_reference
from tests.mtlora.ops.replay import Graph

D, LAYERS, SLOTS, TOKENS = 64, 2, 4, 8
CAPTURE_SIZES = [2, 4]
BACKBONE = BackboneIdentity(
    architecture="LlamaForCausalLM", hidden_size=D, num_layers=LAYERS, weights_fingerprint="0" * 64
)


class Halve(nn.Module):
    """An MLP whose output has one address: y = x / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.y_TD = torch.full((TOKENS, D), float("nan"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y_TD = self.y_TD[: len(x)]
        Graph.do(lambda: torch.mul(x, 0.5, out=y_TD))
        return y_TD


class Model(nn.Module):
    """A stack of blocks over an input of one address."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Halve()}) for _ in range(LAYERS))
        self.x_TD = torch.full((TOKENS, D), float("nan"))

    def forward(self, padded_tokens: int) -> torch.Tensor:
        hidden_TD = self.x_TD[:padded_tokens]
        for layer in self.layers:
            hidden_TD = layer["mlp"](hidden_TD)
        return hidden_TD


def make_runner(**changes: Any) -> Any:
    """vLLM's LoRA mixin over this project's managers and a store that reads adapters from the disk."""
    from mtlora.vllm_plugin.store import AdapterStore

    sizes = {"num_blocks": LAYERS, "max_adapters": SLOTS, "max_tokens": TOKENS, "num_sms": 1, "max_parts": 2} | changes

    def store_of(manager: Any) -> AdapterStore:
        return AdapterStore(
            BACKBONE.model_dump(), [block.block_name for block in manager.blocks], device=manager.device,
            dtype=torch.float32, gpu=manager.gpu, on_drop=lambda adapter: manager.step.release(adapter.rows),
        )  # fmt: skip

    return runner_over(Model(), KernelConfig(D, torch.float32, **sizes), store_of)


class Fleet:
    """A runner with adapters on disk, and the oracle's output for a batch."""

    def __init__(self, tmp_path: Any) -> None:
        self.runner = make_runner()
        self.folder = tmp_path
        self.requests: dict[int, Any] = {}
        self.checkpoints: dict[int, Any] = {}
        for slot_id in (1, 2, 3):
            self.add(slot_id, seed=slot_id)

    def add(self, slot_id: int, seed: int, frozen: Iterable[int] = ()) -> None:
        """Load a random adapter under an id, whatever had it before. frozen: layers whose experts are zero."""
        from vllm.lora.request import LoRARequest

        if slot_id in self.requests:
            self.runner.remove_lora(slot_id)
        folder = self.folder / str(seed)
        make_adapter(folder, BACKBONE, MtLoRAConfig(r=1 + seed, num_experts=2, num_groups=2), seed=seed, frozen=frozen)
        self.requests[slot_id] = LoRARequest(f"a{seed}", slot_id, f"{folder}#t1")
        self.checkpoints[slot_id] = read_checkpoint(folder)
        self.runner.add_lora(self.requests[slot_id])

    def map(self, ids: list[int]) -> None:
        """Tell the runner each token's slot, as both runners do."""
        self.runner._set_active_loras(tuple(ids), tuple(ids), {self.requests[i] for i in ids if i})

    def check(self, ids: list[int], run: Any, padded_tokens: int, seed: int) -> None:
        """Give the graph an input in place, replay it, and compare."""
        model, T = self.runner.model, len(ids)
        generator = torch.Generator().manual_seed(seed)
        model.x_TD.fill_(float("nan"))
        model.x_TD[:T] = torch.randn(T, D, generator=generator)
        self.runner.lora_manager._adapter_manager.step.scratch.fill_(float("nan"))
        for layer in model.layers:
            layer["mlp"].base_layer.y_TD.fill_(float("nan"))
        run()
        expected_TD = model.x_TD[:T].double()
        for number in range(LAYERS):
            x_TD, expected_TD = expected_TD.float(), expected_TD / 2
            for t, slot_id in enumerate(ids):
                if slot_id:
                    name = f"layers.{number}.mlp"
                    delta = path_reference(self.checkpoints[slot_id], "t1", name, x_TD[t : t + 1])
                    assert delta is not None
                    expected_TD[t] += delta[0]
        y_TD = model.layers[-1]["mlp"].base_layer.y_TD
        torch.testing.assert_close(y_TD[:T].double(), expected_TD, atol=1e-4, rtol=1e-4)
        assert y_TD[padded_tokens:].isnan().all()


@pytest.fixture
def fleet(tmp_path: Any) -> Fleet:
    return Fleet(tmp_path)


def vllm_config(mode: str) -> Any:
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.config.lora import LoRAConfig

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode[mode], mode=CompilationMode.VLLM_COMPILE, splitting_ops=["attention"],
        cudagraph_capture_sizes=CAPTURE_SIZES, max_cudagraph_capture_size=CAPTURE_SIZES[-1], compile_sizes=None,
        cudagraph_specialize_lora=True, is_attention_compiled_piecewise=lambda: True,
    )  # fmt: skip
    return SimpleNamespace(
        compilation_config=compilation, lora_config=LoRAConfig(max_loras=SLOTS, max_cpu_loras=SLOTS),
        num_speculative_tokens=0, speculative_config=None, scheduler_config=SimpleNamespace(max_num_seqs=TOKENS),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )  # fmt: skip


def test_graphs_of_the_first_runner_give_the_eager_results(fleet: Fleet) -> None:
    """V1: it maps unpadded tokens before it dispatches, and counts the adapters of all its requests."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    runner, dispatcher = fleet.runner, CudagraphDispatcher(vllm_config("FULL_AND_PIECEWISE"))
    dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)
    graphs: dict[Any, Graph] = {}
    with runner.maybe_setup_dummy_loras(runner.lora_config):
        for kind, descriptors in dispatcher.get_capture_descs():
            for descriptor in descriptors:
                ones = np.ones(descriptor.num_tokens, dtype=np.int32)
                graph = graphs[kind, descriptor] = Graph()
                with (
                    runner.maybe_dummy_run_with_lora(
                        runner.lora_config, ones, ones, remove_lora=False, num_active_loras=descriptor.num_active_loras
                    ),
                    graph.capture(),
                ):
                    runner.model(descriptor.num_tokens)
    assert {len(graph.launched) for (_, d), graph in graphs.items() if d.has_lora} == {2 * LAYERS}
    assert {len(graph.launched) for (_, d), graph in graphs.items() if not d.has_lora} == {0}
    steps = [
        # Slots of the scheduled tokens, adapters of all requests.
        ([1, 2, 0], 2), ([1, 2, 0], 2), ([3, 3, 3, 1], 3), ([0], 2), ([0, 0, 0], 0), ([2], 1),
    ]  # fmt: skip
    for uniform in (True, False):
        for seed, (ids, adapters) in enumerate(steps):
            fleet.map(ids)
            key = dispatcher.dispatch(len(ids), uniform, has_lora=adapters > 0, num_active_loras=adapters)
            assert key[0] == (CUDAGraphMode.FULL if uniform else CUDAGraphMode.PIECEWISE)
            fleet.check(ids, graphs[key].replay, key[1].num_tokens, seed)
        fleet.add(2, seed=7)  # other weights under an id that was seen
        fleet.map([2])
        fleet.check([2], graphs[key].replay, key[1].num_tokens, seed=99)
        fleet.add(2, seed=2)


def test_graphs_of_the_second_runner_give_the_eager_results(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """V2: its own manager captures and dispatches; it maps after that."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.lora_utils import create_lora_capture_hook, get_lora_capture_cases

    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    monkeypatch.setattr(cudagraph_utils, "is_global_first_rank", lambda: False)
    monkeypatch.setattr(cudagraph_utils, "graph_capture", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cudagraph_utils, "capture_pool", lambda pool, config: contextlib.nullcontext())
    monkeypatch.setattr(cudagraph_utils, "current_stream", lambda: None)
    monkeypatch.setattr(cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: graph.capture())

    runner, config = fleet.runner, vllm_config("FULL")
    cases = get_lora_capture_cases(runner.lora_config, config.compilation_config)
    assert cases == [0, SLOTS + 1]
    manager = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), CUDAGraphMode.FULL, 1, cases)
    hook = create_lora_capture_hook(runner.lora_config, runner)
    assert hook is not None

    def create_forward_fn(descriptor: Any, warmup: bool) -> Any:
        hook(descriptor.num_active_loras, descriptor.num_reqs, descriptor.num_tokens)
        return lambda kind: runner.model(descriptor.num_tokens)

    with runner.maybe_setup_dummy_loras(runner.lora_config):
        manager.capture(create_forward_fn)
    assert len(manager.graphs) == 2 * len(CAPTURE_SIZES)
    for seed, ids in enumerate([[1, 2, 0], [1, 2, 0], [3, 3, 3, 1], [0], [2]]):
        active = len({i for i in ids if i})
        descriptor = manager.dispatch(len(ids), len(ids), None, active)
        assert descriptor.cg_mode == CUDAGraphMode.FULL
        fleet.map(ids)
        graph: Any = manager.graphs[descriptor]
        assert len(graph.launched) == (2 * LAYERS if active else 0)
        fleet.check(ids, lambda descriptor=descriptor: manager.run_fullgraph(descriptor), descriptor.num_tokens, seed)


def test_sampled_routing_on_a_gpu_is_that_of_the_served_tokens(fleet: Fleet) -> None:
    from mtlora.vllm_plugin.sampling import RoutingSampler

    step = fleet.runner.lora_manager._adapter_manager.step
    step.sampler = RoutingSampler(steps=2, num_blocks=LAYERS)
    eager = fleet.runner.model
    for seed in range(6):
        fleet.map([1, 1, 0])  # the same mapping in every step, which vLLM leaves as it is
        fleet.check([1, 1, 0], lambda: eager(3), 3, seed)
    sums = step.sampler.sums()
    # Steps 2 and 4 were sampled; each sample was copied in the next step, and counted in the one after that.
    assert list(sums) == ["a1"]
    assert sums["a1"]["rows"] == 2 * 2 * 2
    assert sum(sums["a1"]["expert_weights"]) == pytest.approx(8)
    assert 0 < sums["a1"]["entropy"] <= 8


def test_refuses_adapters_that_the_engine_was_not_started_for(tmp_path: Any) -> None:
    from vllm.lora.request import LoRARequest

    from mtlora.checkpoint.format import CheckpointError

    runner = make_runner(max_rank=4)
    for name, config, message in (
        ("large", MtLoRAConfig(r=5, num_experts=2, num_groups=2), "found rank 5; this engine .* max_rank 4"),
        ("both", MtLoRAConfig(r=2, num_experts=2, num_groups=2, blocks="both"), "beside mlp alone, and 'self_attn'"),
    ):
        make_adapter(tmp_path / name, BACKBONE, config)
        with pytest.raises(CheckpointError, match=rf"{name}: config.*{message}"):
            runner.add_lora(LoRARequest(name, 1, str(tmp_path / name)))


def test_layers_that_training_left_frozen_are_skipped(fleet: Fleet) -> None:
    fleet.add(2, seed=7, frozen=[0])
    fleet.add(3, seed=8, frozen=range(LAYERS))
    eager = fleet.runner.model
    for seed, ids in enumerate([[1, 2, 3, 0], [3], [2, 3]]):
        fleet.map(ids)
        fleet.check(ids, lambda ids=ids: eager(len(ids)), len(ids), seed)
    slots = fleet.runner.lora_manager._adapter_manager._slots
    active = {slot_id: set(slots[slot_id].adapter.rows.active) for slot_id in (1, 2, 3)}
    assert active == {1: set(range(LAYERS)), 2: set(range(1, LAYERS)), 3: set()}


def test_weights_leave_memory_and_the_table_with_their_last_slot(fleet: Fleet) -> None:
    import weakref

    manager = fleet.runner.lora_manager._adapter_manager
    fleet.map([1, 2])
    rows = weakref.ref(next(iter(manager.step._row_of)))
    assert sorted(manager.step._row_of.values()) == [2, 3]
    for slot_id in (1, 2, 3):
        fleet.runner.remove_lora(slot_id)
    assert not manager.step._row_of
    assert not manager.step._table.rows_LAF.any()
    assert rows() is None


@pytest.mark.parametrize("max_tokens", [16, 500, 1024])
def test_whatever_a_step_launches_was_compiled_at_the_start(max_tokens: int) -> None:
    from mtlora.vllm_plugin.gpu_step import GpuStep

    config = KernelConfig(D, torch.bfloat16, num_blocks=1, max_adapters=1, max_tokens=max_tokens)
    table = AdapterTable(
        1, 1, hidden_size=D, dtype=config.dtype, device=torch.device("cpu"), config=config
    )  # fmt: skip
    start = Graph()
    with start.capture():
        GpuStep(table, config)

    def compiled(launch: triton_gpu.Launch) -> tuple[object, ...]:
        constants = tuple(sorted((name, str(value)) for name, value in launch.constants.items()))
        return launch.kernel.fn.__name__, constants, launch.num_warps, launch.num_stages, launch.max_registers

    needed = {compiled(launch) for n in range(1, max_tokens + 1) for launch in triton_gpu.launches(config, n)}
    assert {compiled(launch) for launch, _ in start.launched} == needed


def test_micro_batches_are_refused_before_the_model_is_touched() -> None:
    from mtlora.vllm_plugin.worker_manager import MtLoRAWorkerManager

    worker: Any = object.__new__(MtLoRAWorkerManager)
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(use_ubatching=True))
    with pytest.raises(ValueError, match="cannot run with use_ubatching"):
        worker.create_lora_manager(None, config)


def test_a_step_places_the_slots_that_the_last_one_lacked(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = fleet.runner.lora_manager
    placed: list[int] = []
    place = worker._place
    monkeypatch.setattr(worker, "_place", lambda slot: (placed.append(slot.id), place(slot)))
    steps = [([1, 2], {1, 2}), ([2, 1], set()), ([1, 3], {3}), ([1], set()), ([1, 2, 3], {2, 3})]
    for ids, expected in steps:
        placed.clear()
        fleet.map(ids)
        assert set(placed) == expected
    fleet.map([1, 2])
    fleet.map([1])
    # A slot that a step kept is more recently used than one that it lacked.
    assert list(worker._adapter_manager._registered_adapters.order)[-2:] == [2, 1]
    fleet.add(1, seed=7)  # other weights under an id of the last step
    fleet.map([1])
    fleet.check([1], lambda: fleet.runner.model(1), 1, 0)


def test_python_between_steps_is_short() -> None:
    """Allows four times the limit of a step, for a busy machine."""
    run = mapping_variants(64, 25)["one adapter"]
    processor_seconds(run, 5)
    assert min(processor_seconds(run, 50)) < 0.6e-3


@pytest.mark.parametrize("broken", [False, True])
def test_the_second_stream_forks_after_x_and_joins_before_y(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """Streams and events are stubs that write down their calls. Graphs that break off get no second stream."""
    from mtlora.vllm_plugin import gpu_step
    from mtlora.vllm_plugin.gpu_step import GpuStep

    calls: list[str] = []
    events = iter(["start", "done"])

    def event() -> Any:
        name = next(events)
        return SimpleNamespace(
            record=lambda: calls.append(f"{name} recorded"), wait=lambda: calls.append(f"{name} awaited")
        )

    @contextlib.contextmanager
    def stream(_: object) -> Iterator[None]:
        calls.append("to the second stream")
        yield
        calls.append("back")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(gpu_step, "_graph_is_broken", lambda: broken)
    monkeypatch.setattr(gpu_step.Path, "begin", lambda *_: calls.append("shrink"))
    monkeypatch.setattr(gpu_step.Path, "finish_", lambda *_: calls.append("expand"))
    monkeypatch.setattr(Graph, "do", lambda work: calls.append("block"))
    manager = fleet.runner.lora_manager._adapter_manager
    manager.step = GpuStep(manager.step._table, manager.gpu, side_stream=True)
    for block in manager.blocks:
        block.step = manager.step
    calls.clear()
    fleet.map([1])
    fleet.runner.model(1)
    fork = ["start recorded", "to the second stream", "start awaited", "shrink", "done recorded", "back"]
    one = ["shrink", "block", "expand"] if broken else [*fork, "block", "done awaited", "expand"]
    assert calls == one * LAYERS
