"""The logger that vLLM passes its statistics to."""

from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from server.engine import EngineStats
from server.engine.stats import stat_logger


def test_statistics_reach_this_logger_alone() -> None:
    """vLLM's own Prometheus logger keeps a series for every combination of adapters that ever ran together."""
    told: list[EngineStats] = []
    manager = StatLoggerManager(
        None, [0, 1], custom_stat_loggers=[stat_logger(told.append)], enable_default_loggers=False
    )
    assert len(manager.stat_loggers) == 1
    state = SchedulerStats(num_running_reqs=3, num_waiting_reqs=1, kv_cache_usage=0.5)
    state.running_lora_adapters = {"a/1@x#t": 2, "a/1@x#u": 1, "b/1@y#t": 0}
    manager.log_engine_initialized()
    manager.record(state, IterationStats(), engine_idx=1)
    manager.record(None, IterationStats(), engine_idx=1)
    manager.log()
    assert told == [EngineStats(3, 1, 0.5, 0, 0, tasks=2, adapters=1, engine=1)]
