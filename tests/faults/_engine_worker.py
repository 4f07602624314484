"""A worker: the engine without gRPC and tenants, with prompts encoded beforehand.

Settings: those of the server. Message: {"requests": [[task id, text], ...]}, which run all at once. Reply:
{"seconds": s, "tokens": generated}.
"""

import asyncio
import atexit
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.versions import newest_version
from benchmarks.harness.worker import Handle, serve

# Answers of full length: a token drawn from the whole vocabulary hardly ever ends one.
PARAMETERS: dict[str, Any] = {"max_new_tokens": 32, "temperature": 2.0, "stop": []}


def start(given: dict[str, Any]) -> Handle:
    """Start the engine and load the newest version of every adapter."""
    from mtlora.backbone import resolve
    from mtlora.checkpoint.read import read_manifest
    from mtlora.client import make_request
    from mtlora.vllm_plugin.requests import slot_requests
    from server.engine import Engine
    from server.job import GenerationJob, ServedTask
    from server.rpc.validation import PromptLimits, Received, validate
    from server.settings import load_settings

    adapters = Path(given["adapters"])
    settings = load_settings(given)
    backbone = resolve(given["backbone"])
    engine = Engine(settings, backbone, lambda _: None)
    engine.start()
    atexit.register(engine.shutdown)
    tasks: dict[str, ServedTask] = {}

    async def load() -> None:
        for adapter in sorted(path for path in adapters.iterdir() if path.is_dir()):
            folder = newest_version(adapter)
            manifest = read_manifest(folder)
            slots = slot_requests(adapter.name, folder.name, folder, manifest, len(tasks) + 1)
            await engine.load(folder, list(slots.values()))
            tasks.update({t.id: ServedTask(t, adapter.name, folder.name, slots[t.id]) for t in manifest.tasks})

    async def generate(jobs: list[GenerationJob]) -> dict[str, Any]:
        async def tokens(job: GenerationJob) -> int:
            return sum([delta.tokens async for delta in engine.generate(job)])

        began = time.perf_counter()
        made = await asyncio.gather(*map(tokens, jobs))
        return {"seconds": time.perf_counter() - began, "tokens": sum(made)}

    runner = asyncio.Runner()
    runner.run(load())
    limits = PromptLimits(settings.max_model_len, engine.vocab_size)

    def job(task_id: str, text: str) -> GenerationJob:
        made = validate(Received(make_request(task_id, text, **PARAMETERS), tasks[task_id]), engine.prompts, limits)
        assert isinstance(made, GenerationJob), made
        return made

    return lambda message: runner.run(generate([job(task_id, text) for task_id, text in message["requests"]]))


if __name__ == "__main__":
    serve(start)
