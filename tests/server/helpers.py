"""Helpers of several test modules."""

import os
import subprocess
import sys
from collections.abc import Awaitable
from typing import Any

import grpc

from mtlora.client import ServerError

# Sampling at random from the whole vocabulary hardly ever meets the end-of-sequence token.
LONG: dict[str, Any] = {"max_new_tokens": 900, "temperature": 2.0, "seed": 1, "stop": [], "without_adapter": True}


def run_cli(*arguments: str, timeout_s: float = 60, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `mtlora-server` with these arguments, and these variables beside those of this process."""
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=timeout_s)


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    """The status that a call ends in, of a stub or of our client."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    except ServerError as error:
        return error.code
    return grpc.StatusCode.OK
