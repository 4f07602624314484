"""The one place where the routed low-rank path is computed: y = F(x) + path(x), for any mix of adapters.

    reference.py     the formula, float64, slow: the oracle of everything else
    routed_lora.py   one block's packed weights, and the path of one adapter in torch ops
    table.py         which adapter is in which slot: a table of pointers, one row a slot, one table a block
    plan.py          which token belongs to which slot: sorted into tiles once a step, read by every block
    operators.py     the registered operator `mtlora::add_routed_lora_` over table and plan
    checks.py        what its tensors must be
    cpu.py           its CPU backend: a compiled kernel, torch ops where that is not built
    triton_gpu.py    its CUDA backend: two launches for any mix
    training.py      the registered operator `mtlora::routed_lora`, with gradients
    cpu_training.py  the compiled kernel of both its passes
    cpu_elementwise.py  compiled operations of the backbone in training
    csrc             the kernels for CPUs, in C++
    cpu_kernel.py    finding them where they are built, and the layout of weights of serving

Weights are never copied into stacks: a slot holds pointers to one adapter's own tensors, so ranks, expert counts and
group counts differ freely between slots, nothing is padded, and placing an adapter writes a few integers.
"""
