"""Python clients of the server, for threads and for asyncio."""

from mtlora.client.access import OPEN, Access
from mtlora.client.client import Answer, AsyncClient, Client, Input, ServerError, make_request
from mtlora.client.metrics_page import MetricsPage

__all__ = [
    "OPEN",
    "Access",
    "Answer",
    "AsyncClient",
    "Client",
    "Input",
    "MetricsPage",
    "ServerError",
    "make_request",
]
