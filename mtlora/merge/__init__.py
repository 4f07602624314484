"""One more task in an adapter, without moving the tasks that it has.

Training sees an adapter of one task, the new one: A, the experts and the routers are the adapter's own and frozen. It
learns a row of router biases, which mixes the existing experts (mode `bias`), and also experts of its own with their
router rows (mode `experts`). Those are closed to the old tasks by a bias that leaves them a softmax weight of exactly
zero. The new row, experts and router rows then go behind the old ones, whose bits nothing touches.

With mode `bias` an old task meets the very tensors it met before, and its outputs are the same bits on every backend.
With mode `experts` its sums have more terms, all of them zero: the same number, but matrix products may add in another
order then, and differ in the last bits.

    merge.py    the steps: train, extend, compare, write
    extend.py   the adapter's tensors and task table, with room for the new task
    compare.py  old tasks' logits before and after
"""
