"""A worker: vLLM's synchronous engine, which generates for token ids.

Settings: keyword arguments of vllm.LLM. Message: {"prompts": [[ids]], "new_tokens": n, "slots": [[lora_name,
lora_int_id, lora_path] or null, ...]}, and, if need be, "point", the activation point of all prompts, "lease", how long
and of how many tokens their documents' blocks are kept, and "salt", that of their cache. Reply: {"seconds": s,
"tokens": generated, "cached": tokens of the prompts from the prefix cache}. Every slot of a message is loaded before
its clock starts.
"""

import time
from typing import Any

from benchmarks.harness.worker import Handle, serve
from mtlora.vllm_plugin.naming import ACTIVATION_KEY, LEASE_KEY

_EXTRA = {"point": ACTIVATION_KEY, "lease": LEASE_KEY}


def start(settings: dict[str, Any]) -> Handle:
    """Start the engine."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(**settings)

    def generate(case: dict[str, Any]) -> dict[str, Any]:
        requests = [slot and LoRARequest(*slot) for slot in case["slots"]]
        for request in {request.lora_int_id: request for request in requests if request}.values():
            engine.llm_engine.add_lora(request)
        parameters = SamplingParams(
            temperature=0,
            max_tokens=case["new_tokens"],
            ignore_eos=True,
            detokenize=False,
            extra_args={key: case[name] for name, key in _EXTRA.items() if name in case} or None,
        )
        salt = {"cache_salt": case["salt"]} if "salt" in case else {}
        prompts: Any = [{"prompt_token_ids": ids, **salt} for ids in case["prompts"]]
        began = time.perf_counter()
        outputs = engine.generate(prompts, parameters, use_tqdm=False, lora_request=requests if any(requests) else None)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "cached": sum(output.num_cached_tokens or 0 for output in outputs),
        }

    return generate


if __name__ == "__main__":
    serve(start)
