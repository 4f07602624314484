"""One engine in a process of its own: reads a case a line on stdin, answers with seconds on stdout.

Cases are JSON: {"prompts": [[ids]], "new_tokens": n, "slots": [[lora_name, lora_int_id, lora_path] or null, ...]}.
The reply is {"seconds": s, "tokens": generated}. Every slot of a case is loaded before its clock starts.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Serve cases until stdin ends. argv[1]: keyword arguments of vllm.LLM as JSON."""
    # vLLM logs to stdout; replies must have it to themselves.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**json.loads(sys.argv[1]))

    def run(case: dict[str, Any]) -> dict[str, float]:
        requests = [slot and LoRARequest(*slot) for slot in case["slots"]]
        for request in {request.lora_int_id: request for request in requests if request}.values():
            engine.llm_engine.add_lora(request)
        parameters = SamplingParams(temperature=0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False)
        prompts: Any = [{"prompt_token_ids": ids} for ids in case["prompts"]]
        began = time.perf_counter()
        outputs = engine.generate(prompts, parameters, use_tqdm=False, lora_request=requests if any(requests) else None)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs)}

    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
