"""One server process: its life (`app`), and that of its engines (`engines`)."""

from server.app.app import App, serve
from server.app.engines import StartError

__all__ = ["App", "StartError", "serve"]
