"""`make bench-gpu`: the routed path on one GPU, and predictions without one.

    correctness.py     the kernels against the formula in float64, over every class of shapes
    cases.py           random batches of every class of shapes, which the tests use too
    serving.py         a decoder's graph with and without the path, checked and timed
    decoder.py         the Llama-shaped decoder
    adapters.py        random adapters in a table, their launches, their oracle
    timing.py          seconds between events on a device, ceilings of a card
    training.py        a training step of one layer beside the loop over experts

    Without a card:
    assembly.py        a kernel's machine code for a card
    generated_code.py  checks bounds for every class of launches
    work.py            counts of both launches' work for a plan; tests compare it with tests/benchmarks/traffic.py
    step_model.py      a step's time predicted for A100, H100 and B200
    backbones.py       sizes of backbones

    vllm_sources.py    vLLM on a card from its Python sources alone

On a card it needs torch, Triton and numpy, no network.
"""
