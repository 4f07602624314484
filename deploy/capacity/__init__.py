"""How many replicas a load needs: fit a service model to a load test's result, simulate many replicas with it.

`python -m deploy.capacity` has the commands; `deploy/capacity.md` is written by one of them.
"""


class CapacityError(ValueError):
    """A result is unusable or a demand cannot be met; the message says why."""
