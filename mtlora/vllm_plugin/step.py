"""Which rows of the running batch belong to which adapter: worked out once a step, read by every block.

Shape suffixes: T tokens of the step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mtlora.vllm_plugin.packed import PackedAdapter, Slot


@dataclass(frozen=True)
class AdapterRows:
    """One adapter's share of a step.

    rows: a slice where its tokens lie together, else their int64 indices.
    bias_rows: int64, the bias table's row of each token, or a single one that all of them have.
    """

    adapter: PackedAdapter
    rows: slice | torch.Tensor
    bias_rows: torch.Tensor


class StepMapping:
    """The step's tokens by adapter. Rows that no adapter claims, padding among them, are in no share.

    One object a model, whose content changes between steps: compiled graphs hold the object, never the content.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.num_tokens = 0
        self.shares: list[AdapterRows] = []

    def clear(self) -> None:
        """No token has an adapter."""
        self.num_tokens, self.shares = 0, []

    def set(self, slot_ids_T: np.ndarray, slot: Callable[[int], Slot]) -> None:
        """Take the slot id of every token, int64 [T], 0 or less for none; `slot` gives the slot of an id."""
        self.clear()
        self.num_tokens = len(slot_ids_T)
        ids, id_index_T = np.unique(slot_ids_T, return_inverse=True)
        adapters: list[PackedAdapter] = []
        share_of_id = np.full(len(ids), -1)
        bias_row_of_id = np.zeros(len(ids), dtype=np.int64)
        for i, slot_id in enumerate(ids):
            if slot_id > 0 and (held := slot(int(slot_id))).adapter is not None:
                if held.adapter not in adapters:
                    adapters.append(held.adapter)
                share_of_id[i] = adapters.index(held.adapter)
                bias_row_of_id[i] = held.bias_row
        share_T, bias_row_T = share_of_id[id_index_T], bias_row_of_id[id_index_T]
        for i, adapter in enumerate(adapters):
            rows = np.flatnonzero(share_T == i)
            together = rows[-1] - rows[0] + 1 == len(rows)
            bias_rows = bias_row_T[rows]
            if (bias_rows == bias_rows[0]).all():
                bias_rows = bias_rows[:1]
            self.shares.append(
                AdapterRows(
                    adapter,
                    slice(int(rows[0]), int(rows[-1]) + 1) if together else self._to_device(rows),
                    self._to_device(bias_rows),
                )
            )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)
