"""The engine driven in process: no gRPC, no tenants, prompts encoded beforehand. A process: requests in, seconds out.

`python -m tests.faults._engine BACKBONE ADAPTERS` reads a JSON list of [task id, text] a line, runs them all at once
and prints seconds and generated tokens.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

# Answers of full length: drawn from the whole vocabulary, they hardly ever end by themselves.
PARAMETERS: dict[str, Any] = {"max_new_tokens": 32, "temperature": 2.0, "stop": []}


def encode(requests: list[tuple[str, str]]) -> str:
    """A line for the process."""
    return json.dumps(requests)


def main() -> None:
    """Serve lines until stdin ends."""
    asyncio.run(_run(sys.argv[1], Path(sys.argv[2])))


async def _run(backbone_name: str, adapters: Path) -> None:
    from mtlora.backbone import resolve
    from mtlora.checkpoint.format import read_manifest
    from mtlora.client import make_request
    from mtlora.vllm_plugin.requests import slot_requests
    from server.engine import Engine
    from server.job import GenerationJob, ServedTask
    from server.registry.version import version_key
    from server.rpc.validation import Limits, validate
    from server.settings import load_settings

    settings = load_settings({"adapters": adapters, "max_num_seqs": 64, "kv_cache_gib": 0.5})
    backbone = resolve(backbone_name)
    engine = Engine(settings, backbone, lambda _: None)
    engine.start()
    tasks: dict[str, ServedTask] = {}
    for adapter in sorted(path for path in adapters.iterdir() if path.is_dir()):
        folder = max(adapter.iterdir(), key=lambda path: version_key(path.name))
        manifest = read_manifest(folder)
        slots = slot_requests(adapter.name, folder.name, folder, manifest, len(tasks) + 1)
        await engine.load(folder, list(slots.values()))
        tasks |= {task.id: ServedTask(task, adapter.name, folder.name, slots[task.id]) for task in manifest.tasks}
    limits = Limits(settings.max_model_len, engine.vocab_size)

    def job(task_id: str, text: str) -> GenerationJob:
        made = validate(make_request(task_id, text, **PARAMETERS), tasks[task_id], engine.tokenizer, limits)
        assert isinstance(made, GenerationJob), made
        return made

    async def tokens(each: GenerationJob) -> int:
        return sum([delta.tokens async for delta in engine.generate(each)])

    try:
        print(0.0, 0, flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            jobs = [job(task_id, text) for task_id, text in json.loads(line)]
            began = time.perf_counter()
            made = await asyncio.gather(*map(tokens, jobs))
            print(time.perf_counter() - began, sum(made), flush=True)
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
