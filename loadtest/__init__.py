"""The load generator. It knows a server through the public gRPC contract only."""


class LoadTestError(Exception):
    """Wrong input or an unreachable server: one message that says what was found and what is allowed."""
