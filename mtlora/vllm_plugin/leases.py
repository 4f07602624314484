"""Keeps the blocks of documents in the KV cache for a while, whatever else runs; in the engine's core.

A request that carries a lease leaves its document's blocks referenced when it ends. Each tenant (known by its cache
salt) has a limit of document tokens, and all tenants together half of the cache; least recently used documents lose
their lease first. If a request finds no free block, leases end before any request is preempted, so leases never block
requests.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mtlora.vllm_plugin.activation import point_of
from mtlora.vllm_plugin.naming import LEASE_KEY


@dataclass
class _Lease:
    salt: str | None
    until: float
    blocks: list[Any]


class Leases:
    """The leases of one KV cache manager of vLLM's."""

    def __init__(self, manager: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._manager = manager
        self._clock = clock
        # Leases by the key of a document's last block; least recently used first.
        self._held: OrderedDict[Any, _Lease] = OrderedDict()

    def keep(self, request: Any) -> None:
        """Start or extend the lease on the document's blocks of a request that ends."""
        extra = request.sampling_params.extra_args if request.sampling_params is not None else None
        if not extra or LEASE_KEY not in extra or not self._manager.enable_caching:
            return
        seconds, most_tokens = extra[LEASE_KEY]
        now, pool, (first, *others) = (
            self._clock(),
            self._manager.block_pool,
            self._manager.coordinator.single_type_managers,
        )
        for key in [key for key, lease in self._held.items() if lease.until <= now]:
            self._end(key)
        size = first.block_size
        count = min(point_of(request.sampling_params, request.num_prompt_tokens), request.num_computed_tokens) // size
        blocks = list(self._manager.get_blocks(request.request_id).blocks[0][:count])
        # Models with different kinds of cache layers have several groups of blocks.
        if others or not blocks or blocks[-1].block_hash is None:
            return
        key = blocks[-1].block_hash
        if key in self._held:
            self._held[key].until = now + seconds
            self._held.move_to_end(key)
            return
        if count * size > most_tokens or count > (most := pool.num_gpu_blocks // 2):
            return
        while (own := self._of(request.cache_salt)) and (sum(map(self._size, own)) + count) * size > most_tokens:
            self._end(own[0])
        while self._held and sum(map(self._size, self._held)) + count > most:
            self._end(next(iter(self._held)))
        pool.touch(blocks)
        self._held[key] = _Lease(request.cache_salt, now + seconds, blocks)

    def give_way(self) -> bool:
        """End the least recently used lease. Returns whether there was one."""
        if not self._held:
            return False
        self._end(next(iter(self._held)))
        return True

    def _of(self, salt: str | None) -> list[Any]:
        return [key for key, lease in self._held.items() if lease.salt == salt]

    def _size(self, key: Any) -> int:
        return len(self._held[key].blocks)

    def _end(self, key: Any) -> None:
        # Free the last blocks first: a prefix is useful without them, but not the reverse.
        self._manager.block_pool.free_blocks(reversed(self._held.pop(key).blocks))


def keep_leases() -> None:
    """Let every KV cache manager of this process keep leases."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    allocate, reset = KVCacheManager.allocate_slots, KVCacheManager.reset_prefix_cache
    free, free_later = KVCacheManager.free, KVCacheManager.pop_blocks_for_free

    def leases_of(manager: Any) -> Leases:
        if not hasattr(manager, "_mtlora_leases"):
            manager._mtlora_leases = Leases(manager)
        leases: Leases = manager._mtlora_leases
        return leases

    def allocate_slots(self: Any, *arguments: Any, **named: Any) -> Any:
        while (blocks := allocate(self, *arguments, **named)) is None and leases_of(self).give_way():
            pass
        return blocks

    def free_request(self: Any, request: Any) -> None:
        leases_of(self).keep(request)
        free(self, request)

    def pop_blocks_for_free(self: Any, request: Any) -> Any:
        leases_of(self).keep(request)
        return free_later(self, request)

    def reset_prefix_cache(self: Any, *arguments: Any, **named: Any) -> Any:
        while leases_of(self).give_way():
            pass
        return reset(self, *arguments, **named)

    KVCacheManager.allocate_slots = allocate_slots
    KVCacheManager.free = free_request
    KVCacheManager.pop_blocks_for_free = pop_blocks_for_free
    KVCacheManager.reset_prefix_cache = reset_prefix_cache
