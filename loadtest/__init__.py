"""The load generator. It knows a server by its public contract alone."""


class LoadTestError(Exception):
    """Wrong input or an unreachable server: one message that says what was found and what is allowed."""
