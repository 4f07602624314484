"""Python clients of the server, for threads and for asyncio."""

from mtlora.client.access import OPEN, Access
from mtlora.client.client import AsyncClient, Client
from mtlora.client.errors import ServerError
from mtlora.client.messages import Answer, Input, make_request
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
