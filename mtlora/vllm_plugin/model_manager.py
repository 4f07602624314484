"""The model's side of the plugin: wraps the blocks, and turns vLLM's mapping of tokens into a step's."""

import re
from collections.abc import Set
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import replace_submodule

from mtlora.families import BLOCK_MODULES, BLOCK_PATTERN
from mtlora.ops import tuning
from mtlora.ops.table import AdapterTable
from mtlora.ops.tuning import KernelConfig
from mtlora.vllm_plugin.block import RoutedBlock
from mtlora.vllm_plugin.options import Options
from mtlora.vllm_plugin.packed import Slot
from mtlora.vllm_plugin.sampling import RoutingSampler
from mtlora.vllm_plugin.step import CpuStep, StepMapping

# Layers of other pipeline stages are placeholders without these modules.
_BLOCK = re.compile(rf"^(?:(?P<stack>.+)\.)?(?P<name>{BLOCK_PATTERN})$")


class MtLoRAModelManager(LRUCacheLoRAModelManager):
    """vLLM's manager, with slots in the place of LoRA models.

    Its LRU caches decide which slots are registered and active. Its `modules`, into whose stacked weights it copies a
    LoRA model's, stay empty: a block reads its weights through the step's table.
    """

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        self.supports_mm = False
        self._max_tokens = max_num_batched_tokens
        # The registered slots; vLLM's cache has them too, but counts every look-up.
        self._slots: dict[int, Slot] = {}
        # (id, path) of the last step's slots that are still registered and active.
        self.applied: Set[tuple[int, str]] = frozenset()
        self.options = Options.of(vllm_config.additional_config)
        self._hidden_size = vllm_config.model_config.get_hidden_size()
        self._dtype = vllm_config.model_config.dtype
        self._layers_by_name = vllm_config.compilation_config.static_forward_context

    def _create_lora_modules(self) -> None:
        self.blocks: list[RoutedBlock] = []
        found = [(path, match) for path, _ in self.model.named_modules() if (match := _BLOCK.match(path))]
        modules = BLOCK_MODULES[self.options.blocks]
        found = [(path, match) for path, match in found if path.rpartition(".")[2] in modules]
        stacks = {match["stack"] for _, match in found}
        if len(stacks) != 1:
            raise ValueError(
                f"{type(self.model).__name__}: expected one stack of decoder layers, with "
                f"{' and '.join(f'layers.N.{module}' for module in modules)}, "
                f"found {sorted(map(str, stacks)) or 'none'}"
            )
        self.gpu = self._kernel_config(len(found))
        self.step = self._new_step(len(found))
        for i, (path, match) in enumerate(found):
            block = RoutedBlock(self.model.get_submodule(path), i, match["name"], f"mtlora.{path}", self.step)
            replace_submodule(self.model, path, block)
            self._layers_by_name[block.layer_name] = block
            self.blocks.append(block)

    def _kernel_config(self, num_blocks: int) -> KernelConfig | None:
        """The config of a GPU's kernels; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return tuning.on_this_card(
            self.device,
            hidden_size=self._hidden_size,
            dtype=self._dtype,
            num_blocks=num_blocks,
            max_adapters=self.lora_slots,
            max_tokens=self._max_tokens,
            max_rank=self.options.max_rank,
            max_experts=self.options.max_experts,
            max_groups=self.options.max_groups,
        )

    def _new_step(self, num_blocks: int) -> StepMapping:
        kind: dict[str, Any] = {"hidden_size": self._hidden_size, "dtype": self._dtype, "device": self.device}
        table = AdapterTable(num_blocks, self.lora_slots, **kind, config=self.gpu)
        sampler = RoutingSampler.from_environment(num_blocks)
        if self.gpu is None:
            return CpuStep(table, sampler)
        # Imported here: CPU installations may have no Triton.
        from mtlora.vllm_plugin.gpu_step import GpuStep

        return GpuStep(table, self.gpu, sampler, side_stream=self.options.side_stream)

    def next_step(self) -> None:
        """Begin a step, before its mapping is set. Sampled routing needs a new plan: the last mapping is dropped."""
        if self.step.next_step():
            self._last_mapping = None

    def touch(self, slot_id: int) -> None:
        """Make a registered, active slot the most recently used."""
        self._registered_adapters.touch(slot_id)
        self._active_adapters.touch(slot_id)

    def _add_adapter(self, slot: Slot) -> None:
        self._registered_adapters[slot.id] = slot
        self._slots[slot.id], self.applied = slot, frozenset()
        # Drop the last mapping: the id may get other weights.
        self._last_mapping = None

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        ids = np.fromiter(mapping.index_mapping, dtype=np.int64, count=len(mapping.index_mapping))
        self.step.set(ids, self._slots.__getitem__)

    def deactivate_adapter(self, adapter_id: int) -> bool:
        """Take a slot out of the active ones; its removal from the registered ones comes here too."""
        self._slots.pop(adapter_id, None)
        self.applied = frozenset()
        deactivated: bool = super().deactivate_adapter(adapter_id)
        return deactivated

    def remove_all_adapters(self) -> None:
        """Empty the caches."""
        super().remove_all_adapters()
        self._slots.clear()
        self.applied = frozenset()
        self.step.clear()
