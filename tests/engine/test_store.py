"""The worker's store of adapters: staging beside steps, placing at once, and the host cache behind it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm.lora.request import LoRARequest

from benchmarks.harness.adapters import random_tensors
from mtlora.checkpoint.format import CheckpointError
from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.vllm_plugin.store import AdapterStore
from tests.engine._models import make_adapter
from tests.server.adapters import entry, write_adapter
from tests.server.slots import TINY

BLOCKS = ["layers.0.mlp", "layers.1.mlp"]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], str]:
    def write(name: str) -> str:
        write_adapter(tmp_path / name, [entry("x"), entry("y")], backbone=TINY, seed=hash(name) % 1000)
        return str(tmp_path / name)

    return write


def store(host_cache_bytes: int = 0) -> AdapterStore:
    return AdapterStore(
        TINY.model_dump(), BLOCKS, device=torch.device("cpu"), dtype=torch.float32, host_cache_bytes=host_cache_bytes
    )


def requests(folder: str, first_id: int = 1) -> list[LoRARequest]:
    return [LoRARequest(f"a/1#{task}", first_id + n, f"{folder}#{task}") for n, task in enumerate("xy")]


def load(into: AdapterStore, folder: str, first_id: int = 1) -> None:
    into.stage(folder)
    into.place(folder, requests(folder, first_id))


def test_loading_in_place_leaves_one_version_in_memory(make: Callable[[str], str]) -> None:
    held, folders = store(), [make("a"), make("b")]
    for version, folder in enumerate(folders):
        for request in requests(folder):
            held.register(
                LoRARequest(request.lora_name, request.lora_int_id, request.lora_path, load_inplace=version > 0)
            )
        if version == 0:
            before = held.resident_bytes()
    assert held.resident_bytes() == before
    assert {str(held.in_step(request).adapter.folder) for request in requests(folders[1])} == {folders[1]}


def test_placing_reads_nothing(make: Callable[[str], str]) -> None:
    held, folder = store(), make("a")
    held.stage(folder)
    shutil.rmtree(folder)
    held.place(folder, requests(folder))
    assert held.slot_ids() == {1, 2}
    one, other = (held.in_step(request) for request in requests(folder))
    assert one.adapter is other.adapter
    assert (one.bias_row, other.bias_row) == (0, 1)


def test_refuses_to_place_what_is_not_staged(make: Callable[[str], str]) -> None:
    held, folder = store(), make("a")
    with pytest.raises(ValueError, match="not staged"):
        held.place(folder, requests(folder))
    held.stage(folder)
    held.unstage(folder)
    with pytest.raises(ValueError, match="not staged"):
        held.place(folder, requests(folder))


def test_placing_is_all_or_nothing(make: Callable[[str], str]) -> None:
    held, folder = store(), make("a")
    held.stage(folder)
    with pytest.raises(ValueError, match="no task 'z'"):
        held.place(folder, [*requests(folder), LoRARequest("a/1#z", 3, f"{folder}#z")])
    assert held.slot_ids() == set()
    held.place(folder, requests(folder))
    held.stage(folder)
    with pytest.raises(ValueError, match="id 1 is in use"):
        held.place(folder, requests(folder))


def test_bad_file_fails_in_staging(make: Callable[[str], str]) -> None:
    held, folder = store(), make("a")
    (Path(folder) / "adapter.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError):
        held.stage(folder)
    assert held.slot_ids() == set()


@pytest.mark.parametrize(
    ("dtype", "alpha", "weight", "message"),
    [
        (torch.float32, 1e300, 1.0, r"layers\.0\.mlp: lora_B \* lora_alpha / r: expected finite values in .*float32"),
        (torch.float16, 1e8, 1.0, r"layers\.0\.mlp: lora_B \* lora_alpha / r: expected finite values in .*float16"),
        (torch.float16, 32.0, 1e5, r"layers\.0\.mlp: lora_A and lora_route: expected .*, found 1 NaN or infinite"),
    ],
)
def test_what_overflows_in_the_engines_dtype_is_refused(
    tmp_path: Path, dtype: torch.dtype, alpha: float, weight: float, message: str
) -> None:
    config = MtLoRAConfig(r=4, num_experts=2, num_groups=2, lora_alpha=alpha)
    tasks = [entry(task).model_copy(update={"bias_index": row}) for row, task in enumerate("xy")]
    tensors = random_tensors(TINY, config, tasks)
    tensors["layers.0.mlp.lora_A"][1, 2] = weight
    write_checkpoint(tmp_path / "a", backbone=TINY, config=config, tasks=tuple(tasks), tensors=tensors)
    read_checkpoint(tmp_path / "a")
    held = AdapterStore(TINY.model_dump(), BLOCKS, device=torch.device("cpu"), dtype=dtype)
    with pytest.raises(CheckpointError, match=message):
        held.stage(str(tmp_path / "a"))


def test_layers_that_training_left_frozen_take_no_memory(tmp_path: Path) -> None:
    bytes_of = {}
    for frozen in ([], [0], [0, 1]):
        folder = tmp_path / f"{len(frozen)}"
        make_adapter(folder, TINY, MtLoRAConfig(r=4, num_experts=2, num_groups=2), frozen=frozen)
        held = store()
        slot = held.register(LoRARequest("a/1#t0", 1, f"{folder}#t0"))
        assert slot.adapter is not None
        assert slot.adapter.rows.active == {0, 1} - set(frozen)
        bytes_of[len(frozen)] = held.resident_bytes()
    assert bytes_of[0] > 0
    assert bytes_of == {0: bytes_of[0], 1: bytes_of[0] // 2, 2: 0}


@pytest.mark.parametrize("cached", [False, True])
def test_host_cache_spares_a_second_reading(make: Callable[[str], str], cached: bool) -> None:
    held, folder = store(1 << 20 if cached else 0), make("a")
    load(held, folder)
    for slot_id in (1, 2):
        assert held.remove(slot_id)
    shutil.rmtree(folder)
    if cached:
        load(held, folder, 5)
        assert held.slot_ids() == {5, 6}
    else:
        with pytest.raises(CheckpointError):
            load(held, folder, 5)


def test_host_cache_keeps_to_its_size_and_drops_the_oldest(make: Callable[[str], str]) -> None:
    folders = [make(name) for name in "abc"]
    one = store()
    load(one, folders[0])
    adapter = one.in_step(requests(folders[0])[0]).adapter
    assert adapter is not None
    held = store(2 * adapter.num_bytes)
    for folder in folders:
        load(held, folder)
        for slot_id in (1, 2):
            held.remove(slot_id)
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError):
        held.stage(folders[0])
    for folder in folders[1:]:
        held.stage(folder)


def test_same_content_under_two_names_is_in_memory_once(make: Callable[[str], str]) -> None:
    held, folder = store(), make("a")
    load(held, folder, 1)
    load(held, folder, 3)
    slots = [held.in_step(LoRARequest("n", slot_id, f"{folder}#x")) for slot_id in (1, 3)]
    assert slots[0].adapter is slots[1].adapter
    for slot_id in (1, 2):
        held.remove(slot_id)
    assert held.in_step(LoRARequest("n", 3, f"{folder}#x")) is slots[1]
