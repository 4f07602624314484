"""Starts and stops one server process (`app`) and its engines (`engines`)."""

from server.app.app import App, serve
from server.app.engines import StartError

__all__ = ["App", "StartError", "serve"]
