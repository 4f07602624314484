"""Python clients of the server, for threads and for asyncio."""

from mtlora.client.access import OPEN, Access
from mtlora.client.async_client import AsyncClient
from mtlora.client.client import Client
from mtlora.client.errors import ServerError
from mtlora.client.images import Classification, ImageSource, make_classification
from mtlora.client.messages import (
    Answer,
    BatchAnswer,
    DocumentAnswer,
    Input,
    Sample,
    Score,
    make_analysis,
    make_batch,
    make_request,
    value_of,
)
from mtlora.client.metrics_page import MetricsPage
from mtlora.client.placement import Placement
from mtlora.client.retry import Retry

__all__ = [
    "OPEN",
    "Access",
    "Answer",
    "AsyncClient",
    "BatchAnswer",
    "Classification",
    "Client",
    "DocumentAnswer",
    "ImageSource",
    "Input",
    "MetricsPage",
    "Placement",
    "Retry",
    "Sample",
    "Score",
    "ServerError",
    "make_analysis",
    "make_batch",
    "make_classification",
    "make_request",
    "value_of",
]
