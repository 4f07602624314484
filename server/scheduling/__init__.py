"""Whose request the engine gets next: quotas, a fair queue, deadlines."""

from server.scheduling.scheduler import Scheduler, Turn

__all__ = ["Scheduler", "Turn"]
