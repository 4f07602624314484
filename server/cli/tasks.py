"""`mtlora-server tasks`: the tasks of a running server, as a table."""

import argparse

from rich.console import Console
from rich.table import Table

from server.cli.connection import add_address, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the server's address."""
    add_address(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table; returns 0."""
    with connect(options) as client:
        tasks = client.tasks()
    table = Table("task", "takes", "adapter", "description")
    for task in tasks:
        image = task.image if task.HasField("image") else task.picture
        takes = ", ".join([*([f"image, {image.size} px"] if image.size else []), *task.fields])
        table.add_row(task.id, takes, f"{task.adapter_name}/{task.adapter_version}", task.description)
    Console().print(table)
    return 0
