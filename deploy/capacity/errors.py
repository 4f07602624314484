"""What makes a capacity question impossible to answer."""


class CapacityError(ValueError):
    """A result that cannot be used, or a request for capacity that nothing can meet; says what and why."""
