"""Adds a task to an adapter without changing its existing tasks.

Training uses an adapter with one task, the new one. A, experts and routers are copied from the old adapter and frozen.
Mode `bias` learns a row of router biases, which mixes the existing experts. Mode `experts` also learns new experts with
their router rows; a bias closes them to the old tasks, whose softmax weight for them is exactly zero. The new bias row,
experts and router rows are appended; old values keep their bits.

In mode `bias`, an old task uses the same tensors as before, and its outputs are bit-identical on every backend. In mode
`experts`, sums get more terms, all zero: matrix products may then add in another order and differ in the last bits.

    merge.py    the steps: train, extend, compare, write
    extend.py   the adapter's tensors and task table, extended by the new task
    compare.py  old tasks' logits before and after
"""
