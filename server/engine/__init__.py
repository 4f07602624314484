"""The engine: vLLM behind an interface of the server's own. Nothing else in the server imports vLLM, and this room only
when an engine starts.

`preflight` says whether this machine can run one. `Supervisor` keeps one engine running: an `Engine` of a language
backbone, or a `VisionEngine`. `launch` starts its processes, `threads` places them on cores, `translation` converts
between the server's types and vLLM's, `stats` reads an engine's statistics.
"""

from server.engine.engine import BaseEngine, Engine, EngineStartError
from server.engine.preflight import check_machine
from server.engine.processes import exit_at_once
from server.engine.stats import EngineStats, RoutingSums, WorkerStats
from server.engine.supervisor import EngineFailure, EngineGaveUpError, Supervisor
from server.engine.vision import VisionEngine

__all__ = [
    "BaseEngine",
    "Engine",
    "EngineFailure",
    "EngineGaveUpError",
    "EngineStartError",
    "EngineStats",
    "RoutingSums",
    "Supervisor",
    "VisionEngine",
    "WorkerStats",
    "check_machine",
    "exit_at_once",
]
