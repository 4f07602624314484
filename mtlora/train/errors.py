"""What training raises of its own."""

from mtlora.errors import MtLoRAError


class TrainingError(MtLoRAError):
    """Training that cannot go on."""
