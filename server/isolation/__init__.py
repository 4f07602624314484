"""Processes untrusted data in a child process under limits: it may take long, fail or be killed."""

from server.isolation.child import ChildEndedError, ChildError, in_child
from server.isolation.limits import Limits

__all__ = ["ChildEndedError", "ChildError", "Limits", "in_child"]
