"""Benchmarks. They report ratios measured in one run on one machine.

    engine/       the engine without a server: throughput, many tasks about one document
    server/       a real server: start and memory, front end, load, typed answers
    vision/       vision backbones: throughput, training, a suite of photographs
    ops/          the routed path on this CPU
    gpu/          the routed path on a GPU, and predictions without one
    claim/        the paper's claim on images: methods, numbers of tasks, seeds
    training.py   a training step, method by method
    merging.py    a task added by merge beside joint training

    harness/      what they share with the fault scenarios and the checks of the deployment

A file is a command if it has a `main`; the Makefile names most of them. `*worker.py` are processes that a benchmark
starts and asks.
"""
