"""How many replicas a load needs: a load test's result, a service model fitted to it, a simulation of many replicas.

`python -m deploy.capacity` has the commands; `deploy/capacity.md` is written by one of them.
"""


class CapacityError(ValueError):
    """A result that cannot be used, or a request for capacity that nothing can meet; says what and why."""
