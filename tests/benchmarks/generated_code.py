"""Compiles a few classes of launches, some deliberately wrong, and prints as JSON what `faults` finds in each.

Run as a separate program, because tests choose Triton's interpreter, which compiles nothing.
"""

import json
from dataclasses import replace

import torch

from benchmarks.gpu.assembly import assemble, loaded_bytes, overlaps_register_products
from benchmarks.gpu.generated_code import LARGEST, classes, faults
from mtlora.ops.triton_gpu import Launch, launches


def main() -> None:
    """Print {class: faults}, and the faults found in wrong launches."""
    bf16, fp16 = torch.bfloat16, torch.float16
    # Every card and class of steps; hidden sizes of every alignment.
    some = [
        one
        for capability, hidden, dtype, tokens, largest in (
            (80, 4096, fp16, 16, LARGEST[0]),
            (80, 896, bf16, 512, LARGEST[1]),
            (80, 2304, bf16, 8192, LARGEST[1]),
            (90, 576, bf16, 16, LARGEST[1]),
            (90, 8192, fp16, 512, LARGEST[1]),
            (90, 4096, bf16, 8192, LARGEST[1]),
            (100, 3584, bf16, 16, LARGEST[1]),
            (100, 576, bf16, 512, LARGEST[1]),
            (100, 4096, fp16, 8192, LARGEST[0]),
        )
        for one in classes((capability,), (hidden,), (dtype,), (tokens,), (largest,))
    ]
    found: dict[str, object] = {str(one): faults(one)[0] for one in some}
    unsound = next(one for one in some if one.config.capability == 90 and not one.config.pipelined)
    shrink, expand = launches(unsound.config, unsound.tokens)
    found["overlaps"] = [
        overlaps_register_products(assemble(replace(expand, num_stages=stages), 90).ptx) for stages in (1, 2)
    ]
    found["a stage too many"] = faults(unsound, lambda launch: replace(launch, num_stages=max(2, launch.num_stages)))[0]
    found["one stage"] = faults(some[0], lambda launch: replace(launch, num_stages=1))[0]
    narrow = next(one for one in some if (one.config.capability, one.config.hidden_size) == (90, 576))

    def too_wide(launch: Launch) -> Launch:
        aligned = {"ALIGNED": 16} if "ALIGNED" in launch.constants else {}
        return replace(launch, constants=launch.constants | aligned)

    found["wide stores"] = faults(narrow, too_wide)[0]
    odd = replace(shrink, constants=shrink.constants | {"HIDDEN": 4097})
    found["wide loads"] = [
        max(loaded_bytes(loop, code.warps, width=16) for loop in code.loops)
        for code in (assemble(shrink, 90), assemble(odd, 90))
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
