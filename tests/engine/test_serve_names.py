"""How `--lora-modules` of vLLM's OpenAI server names a task of an adapter of many."""

from pathlib import Path

import pytest
import torch

from tests.factories import CONFIG, IDENTITY, task_table, write_random


@pytest.mark.parametrize(
    ("name", "suffix", "row"),
    [("task-2", "", 0), ("anything", "#task-2", 0), ("task-0", "#task-1", 1), ("task-0", "", 2), ("other", "", -1)],
)
def test_module_name_or_path_names_the_task(tmp_path: Path, name: str, suffix: str, row: int) -> None:
    from vllm.lora.request import LoRARequest

    from mtlora.vllm_plugin.store import AdapterStore

    write_random(tmp_path / "a")
    assert [task.bias_index for task in task_table(3)] == [2, 1, 0]
    blocks = [f"layers.{layer}.{module}" for layer in range(IDENTITY.num_layers) for module in CONFIG.modules]
    store = AdapterStore(IDENTITY.model_dump(), blocks, device=torch.device("cpu"), dtype=torch.float32)
    assert store.register(LoRARequest(name, 1, f"{tmp_path / 'a'}{suffix}")).bias_row == row
