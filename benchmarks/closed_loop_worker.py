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
    adapters = [(name, version, Path(folder)) for name, version, folder in settings["adapters"]]
    engine = InProcessEngine(settings["backbone"], adapters, settings["engine"])
    return lambda case: engine.run(case["requests"], case["in_flight"])


class InProcessEngine:
    """vLLM's synchronous engine in this process, with the adapters' tasks loaded."""

    def __init__(self, backbone: str, adapters: list[tuple[str, str, Path]], arguments: dict[str, Any]) -> None:
        from vllm import LLM

        from mtlora.backbone import identify, resolve
        from mtlora.checkpoint.read import read_checkpoint
        from mtlora.vllm_cpu.precision import engine_dtype
        from mtlora.vllm_plugin import engine_overrides
        from mtlora.vllm_plugin.requests import slot_requests

        folder = resolve(backbone)
        arguments = {
            **arguments,
            # The same dtype and settings as a server on this machine.
            "dtype": engine_dtype(arguments.get("dtype", "auto"), folder),
            **engine_overrides(arguments.get("max_num_seqs", 64)),
        }
        llm = LLM(model=str(folder), **arguments)
        self._engine: Any = llm.llm_engine
        self._tokenizer: Any = llm.get_tokenizer()
        self._tasks: dict[str, tuple[Any, Any]] = {}
        next_id = 1
        for name, version, path in adapters:
            manifest = read_checkpoint(path, identify(folder)).manifest
            slots = slot_requests(name, version, path, manifest, next_id)
            distinct = {slot.lora_int_id: slot for slot in slots.values()}
            next_id = max(distinct) + 1
            for slot in distinct.values():
                self._engine.add_lora(slot)
            self._tasks |= {task.id: (task, slots[task.id]) for task in manifest.tasks}

    def run(self, requests: list[tuple[str, str]], in_flight: int) -> dict[str, Any]:
        """Answer every request in order, `in_flight` at a time: when one ends, the next begins."""
        from mtlora.prompt import encode_prompt

        prompts = [encode_prompt(self._tokenizer, self._tasks[task_id][0].render(text)) for task_id, text in requests]
        waiting = iter(range(len(requests)))
        texts = [""] * len(requests)
        completion_tokens = 0
        began = time.perf_counter()
        for index in islice(waiting, in_flight):
            self._add(index, requests[index][0], prompts[index])
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if not output.finished:
                    continue
                texts[int(output.request_id.split("-")[0])] = output.outputs[0].text.strip()
                completion_tokens += len(output.outputs[0].token_ids)
                for index in islice(waiting, 1):
                    self._add(index, requests[index][0], prompts[index])
        return {
            "seconds": time.perf_counter() - began,
            "prompt_tokens": sum(map(len, prompts)),
            "completion_tokens": completion_tokens,
            "texts": texts,
        }

    def _add(self, index: int, task_id: str, prompt_ids: list[int]) -> None:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        task, slot = self._tasks[task_id]
        parameters = SamplingParams(
            temperature=0, max_tokens=task.max_new_tokens, stop=list(task.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self._engine.add_request(f"{index}-", tokens_input(prompt_ids), parameters, lora_request=slot)


if __name__ == "__main__":
    serve(start)
