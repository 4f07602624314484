"""An engine's adapter options besides vLLM's arguments: the key `mtlora` of its `additional_config`."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from mtlora.families import BLOCK_MODULES, Blocks

KEY = "mtlora"


@dataclass(frozen=True)
class Options:
    """An engine's options.

    host_cache_bytes: host memory for packed adapters that have lost their slots.
    blocks: the blocks that adapters may have paths for. A block costs two launches a step on a GPU, used or not.
    max_rank, max_experts, max_groups: the largest adapter that a GPU takes; they size its scratch space.
    side_stream: on a GPU, compute the first half of an MLP's path on a second stream, beside the MLP.
    """

    host_cache_bytes: int = 0
    blocks: Blocks = "both"
    max_rank: int = 64
    max_experts: int = 32
    max_groups: int = 32
    side_stream: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a value that is not allowed."""
        if self.blocks not in BLOCK_MODULES:
            raise ValueError(f"{KEY}.blocks: found {self.blocks!r}; allowed: {', '.join(BLOCK_MODULES)}")
        for name in ("max_rank", "max_experts", "max_groups"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{KEY}.{name}: found {value}; allowed: 1 and more")

    @staticmethod
    def of(additional_config: Any) -> "Options":
        """The options in a vLLM config's `additional_config`. Raises ValueError for an unknown or wrong one."""
        given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
        names = [field.name for field in fields(Options)]
        if unknown := sorted(given.keys() - set(names)):
            raise ValueError(f"{KEY}.{unknown[0]}: no such option; allowed: {', '.join(names)}")
        return Options(**given)

    def as_config(self) -> dict[str, Any]:
        """The options in the form of `additional_config`."""
        return {KEY: asdict(self)}
