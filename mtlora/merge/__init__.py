"""One more task in an adapter, without moving the tasks that it has.

Training sees an adapter of one task, the new one. A, the experts and the routers come from the adapter and stay frozen.
Mode `bias` learns a row of router biases, which mixes the existing experts. Mode `experts` also learns new experts with
their router rows; a bias closes them to the old tasks, whose softmax weight for them is exactly zero. The new row,
experts and router rows go behind the old ones, which keep their bits.

With mode `bias`, an old task uses the same tensors as before, and its outputs are the same bits on every backend. With
mode `experts`, its sums have more terms, all zero: matrix products may then add in another order, and differ in the
last bits.

    merge.py    the steps: train, extend, compare, write
    extend.py   the adapter's tensors and task table, with room for the new task
    compare.py  old tasks' logits before and after
"""
