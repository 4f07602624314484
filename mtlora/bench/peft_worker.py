"""Hugging Face PEFT with mixed-adapter batches, in a process of its own: `mtlora.bench.worker`'s protocol.

A case's prompts run in static batches of up to `batch` sequences, padded on the left, through
`generate(adapter_names=...)`, each row with the adapter of its slot. Adapters are loaded before the clock starts.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Serve cases until stdin ends. argv[1]: {"model": folder, "dtype": name, "batch": sequences} as JSON."""
    # Libraries print to stdout; replies must have it to themselves.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = json.loads(sys.argv[1])
    backbone = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=getattr(torch, settings["dtype"])).eval()
    model: Any = None

    def load(slots: dict[str, str]) -> None:
        nonlocal model
        # In the backbone's dtype, as vLLM has them; PEFT's own choice for inference too would be float32.
        options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        for name, path in slots.items():
            if model is None:
                model = PeftModel.from_pretrained(backbone, path, adapter_name=name, **options).eval()
            elif name not in model.peft_config:
                model.load_adapter(path, name, **options)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], names: list[str], new_tokens: int) -> int:
        length = max(map(len, prompts))
        tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = model.generate(
            input_ids=tokens, attention_mask=mask, adapter_names=names, do_sample=False,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
        return int(found.shape[0] * (found.shape[1] - length))

    def run(case: dict[str, Any]) -> dict[str, float]:
        load({name: path for name, _, path in case["slots"]})
        names = [name for name, _, _ in case["slots"]]
        began, tokens = time.perf_counter(), 0
        for first in range(0, len(names), settings["batch"]):
            rows = slice(first, first + settings["batch"])
            tokens += generate(case["prompts"][rows], names[rows], case["new_tokens"])
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
