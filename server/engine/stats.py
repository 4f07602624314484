"""Converts vLLM's statistics of steps and processes to the server's types."""

from collections.abc import Callable
from typing import Any

from server.telemetry.engine_stats import EngineStats, RoutingSums, WorkerStats


def worker_stats(rank: dict[str, Any]) -> WorkerStats:
    """The result of a rank's `mtlora_statistics` as WorkerStats."""
    routing = {adapter: RoutingSums(**sums) for adapter, sums in rank["routing"].items()}
    return WorkerStats(**{**rank, "routing": routing})


def stat_logger(on_stats: Callable[[EngineStats], None]) -> type:
    """A logger class for vLLM that passes each step's statistics on.

    It subclasses vLLM's Prometheus logger, which vLLM would otherwise add. That logger takes time in every step and
    keeps a series for every combination of adapters that ever ran together.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class StatLogger(PrometheusStatLogger):
        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            pass

        def record(
            self,
            scheduler_stats: Any,
            iteration_stats: Any,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if scheduler_stats is not None:
                running = [name for name, count in scheduler_stats.running_lora_adapters.items() if count]
                on_stats(
                    EngineStats(
                        running=scheduler_stats.num_running_reqs,
                        waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                        kv_cache_usage=scheduler_stats.kv_cache_usage,
                        prefix_cache_queries=scheduler_stats.prefix_cache_stats.queries,
                        prefix_cache_hits=scheduler_stats.prefix_cache_stats.hits,
                        preemptions=iteration_stats.num_preempted_reqs if iteration_stats else 0,
                        finished=len(iteration_stats.finished_requests) if iteration_stats else 0,
                        tasks=len(running),
                        adapters=len({name.partition("#")[0] for name in running}),
                        engine=engine_idx,
                    )
                )

        def log_engine_initialized(self) -> None:
            pass

        def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
            pass

        def record_admission_rejection(self, reason: str) -> None:
            pass

    return StatLogger
