"""Helpers of several test modules."""

import os
import socket
import subprocess
import sys
from typing import Any

# Sampling at random from the whole vocabulary hardly ever meets the end-of-sequence token.
LONG: dict[str, Any] = {"max_new_tokens": 900, "temperature": 2.0, "seed": 1, "stop": [], "without_adapter": True}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_cli(*arguments: str, timeout_s: float = 60, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `mtlora-server` with these arguments, and these variables beside those of this process."""
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=timeout_s)
