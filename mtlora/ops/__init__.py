"""Computes the routed low-rank path, y = F(x) + path(x), for any mix of adapters. No other package computes it.

    reference.py     the formula in float64: slow, every other implementation is tested against it
    packed_block.py  one block's weights, packed, and the path of one adapter in torch ops

    Serving: a step's whole mix of adapters
    table.py         which adapter is in which row: a table of pointers for each block
    plan.py          which token belongs to which row: sorted into tiles once a step, read by every block
    cpu.py           the CPU backend: a compiled kernel, or torch ops without it
    mix.py           its tensors and the checks of them
    triton_gpu.py    the GPU backend: two launches per block for any mix, usable in captured graphs
    tuning.py        its launch configuration: how the work is divided

    Training: `mtlora::path_with_gradients`, one adapter
    training.py      the registered operator; forward and backward in torch ops
    cpu_training.py  forward and backward by the compiled kernel
    cpu_elementwise.py  the backbone's norms, gates and softmax on a CPU, also in serving

    csrc             the kernels for CPUs, in C++
    cpu_kernel.py    loads them, and lays out weights for serving

Weights are never copied into stacks: a row points at one adapter's own tensors. So ranks, expert counts and group
counts differ freely between rows, and placing an adapter writes a few integers.
"""
