"""A worker: an engine without a server answers tasks in a closed loop, as clients ask a server.

Settings: {"backbone": name or folder, "adapters": [[name, version, folder], ...], "engine": {keyword arguments of
vllm.LLM}}. Message: {"in_flight": n, "requests": [[task_id, text], ...]}. Reply: {"seconds": s, "prompt_tokens": p,
"completion_tokens": c, "texts": [...]} in the order of the requests.

Prompts, stop strings and lengths come from the adapters' task tables, greedy, as in a server. Prompts are tokenized
before the clock starts, and no answer crosses a process border: this is what the engine alone can do.
"""

import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.harness.worker import Handle, serve


def start(settings: dict[str, Any]) -> Handle:
    """Load the adapters into an engine."""
    from vllm import LLM
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    from mtlora.backbone import identify, resolve
    from mtlora.checkpoint.read import read_checkpoint
    from mtlora.prompt import PromptEncoder
    from mtlora.vllm_cpu.precision import engine_dtype
    from mtlora.vllm_plugin import engine_overrides
    from mtlora.vllm_plugin.requests import slot_requests

    folder = resolve(settings["backbone"])
    arguments = {
        **settings["engine"],
        # The same dtype and settings as a server on this machine.
        "dtype": engine_dtype(settings["engine"].get("dtype", "auto"), folder),
        **engine_overrides(settings["engine"].get("max_num_seqs", 64)),
    }
    llm = LLM(model=str(folder), **arguments)
    engine: Any = llm.llm_engine
    # Entry in the task table and slot, by task id.
    tasks: dict[str, tuple[Any, Any]] = {}
    next_id = 1
    for name, version, path in settings["adapters"]:
        manifest = read_checkpoint(Path(path), identify(folder)).manifest
        slots = slot_requests(name, version, Path(path), manifest, next_id)
        distinct = {slot.lora_int_id: slot for slot in slots.values()}
        next_id = max(distinct) + 1
        for slot in distinct.values():
            engine.add_lora(slot)
        tasks |= {task.id: (task, slots[task.id]) for task in manifest.tasks}

    encoder = PromptEncoder(llm.get_tokenizer())

    def run(case: dict[str, Any]) -> dict[str, Any]:
        """Answer every request in order, `in_flight` at a time: when one ends, the next begins."""
        requests = case["requests"]
        prompts = [encoder.prompt(tasks[task_id][0].render(text)) for task_id, text in requests]
        waiting = iter(range(len(requests)))
        texts = [""] * len(requests)
        completion_tokens = 0

        def add(count: int) -> None:
            for index in islice(waiting, count):
                task, slot = tasks[requests[index][0]]
                parameters = SamplingParams(
                    temperature=0, max_tokens=task.max_new_tokens, stop=list(task.stop),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )  # fmt: skip
                engine.add_request(f"{index}-", tokens_input(prompts[index]), parameters, lora_request=slot)

        began = time.perf_counter()
        add(case["in_flight"])
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    texts[int(output.request_id.split("-")[0])] = output.outputs[0].text.strip()
                    completion_tokens += len(output.outputs[0].token_ids)
                    add(1)
        return {
            "seconds": time.perf_counter() - began,
            "prompt_tokens": sum(map(len, prompts)),
            "completion_tokens": completion_tokens,
            "texts": texts,
        }

    return run


if __name__ == "__main__":
    serve(start)
