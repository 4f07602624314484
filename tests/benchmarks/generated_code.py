"""A few classes of launches compiled, and some made wrong, as JSON: what `faults` finds in each.

Run as a separate program, because tests choose Triton's interpreter, which compiles nothing.
"""

import json
from dataclasses import replace

import torch

from benchmarks.gpu.assembly import assemble, loaded_bytes, overlaps_register_products
from benchmarks.gpu.generated_code import classes, faults
from mtlora.ops.triton_gpu import launches


def main() -> None:
    """Print {class: faults}, and what is seen of launches made wrong."""
    some = [
        *classes((80,), (4096,), (torch.float16,), (16,)),
        *classes((90,), (4096,), (torch.bfloat16,), (8192,)),
        *classes((100,), (576,), (torch.bfloat16,), (512,)),
    ]
    found: dict[str, object] = {str(one): faults(one)[0] for one in some}
    unsound = next(one for one in some if one.config.capability == 90 and not one.config.pipelined)
    shrink, expand = launches(unsound.config, unsound.tokens)
    found["overlaps"] = [
        overlaps_register_products(assemble(replace(expand, num_stages=stages), 90).ptx) for stages in (1, 2)
    ]
    found["a stage too many"] = faults(unsound, lambda launch: replace(launch, num_stages=max(2, launch.num_stages)))[0]
    found["one stage"] = faults(some[0], lambda launch: replace(launch, num_stages=1))[0]
    odd = replace(shrink, constants=shrink.constants | {"HIDDEN": 4097})
    found["wide loads"] = [
        max(loaded_bytes(loop, code.warps, width=16) for loop in code.loops)
        for code in (assemble(shrink, 90), assemble(odd, 90))
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
