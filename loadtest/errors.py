"""What a user of the load generator can put right."""


class LoadTestError(Exception):
    """Wrong input or an unreachable server: one message that says what was found and what is allowed."""
